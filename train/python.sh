# Sourced by the scripts beside it, from the root of the checkout: chooses PYTHON unless it is set, and tries it.
if [ -z "${PYTHON:-}" ]; then
    if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; else PYTHON=python3; fi
fi
if ! "$PYTHON" -c 'from importlib.util import find_spec as f; exit(not (f("torch") and f("jsonargparse")))'; then
    echo "error: $PYTHON has no torch or jsonargparse" >&2
    echo "  fix: make test (or make quickstart) makes .venv; or set PYTHON to an environment with the package" >&2
    exit 3
fi
export PYTHON
