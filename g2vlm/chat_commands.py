"""What `g2vlm ask` and `g2vlm chat` do, once their arguments are parsed."""

import json
import logging
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from jsonargparse import Namespace
from transformers.utils.logging import disable_progress_bar

from g2vlm.asking import Answer, Context
from g2vlm.commands import dtype_of
from g2vlm.errors import CheckFailed, G2VLMError, InputError
from g2vlm.export import check_output_folder
from g2vlm.images import SourceImage
from g2vlm.pipeline import Geometry, Pipeline, load, read_sources
from g2vlm.prompts import place_images
from g2vlm.sampling import GenerationOptions

log = logging.getLogger(__name__)
disable_progress_bar()


# ---------------------------------------------------------------------------------------------- ask


@dataclass(frozen=True)
class Line:
    """A question and what identifies it in the output: {"id": ...} if its line had one."""

    question: str
    facts: dict[str, Any]


def ask(args: Namespace) -> None:
    """Answer the questions of the command line, then those of stdin.

    Raises:
        CheckFailed: lines of stdin were refused; the others are answered.
    """
    questions = args.question or []
    if not questions and not args.stdin:
        raise InputError("no question", "there is neither --question nor --stdin", 'add -q "..."')
    if args.save_geometry is not None:
        check_output_folder(args.save_geometry, args.overwrite)
    options = replace(_options(args), batch_size=args.batch_size)
    sources = read_sources(args.images, args.max_views, args.skip_bad)
    for question in questions:
        place_images(question, sources)  # a wrong question is told before the weights are read
    pipeline = _load(args)
    context = pipeline.context_of_sources(sources, args.geometry, args.save_geometry is not None, args.width)
    for question in questions:
        context.turn(question, options)
    asked = _Asked(context, options, args, len(sources), pipeline.name)
    asked.answer([Line(question, {}) for question in questions])
    if args.stdin:
        asked.answer_lines(enumerate(sys.stdin.buffer, 1))
    asked.finish()


class _Asked:
    """Prints answers as they come, and counts the lines that could not be asked."""

    def __init__(self, context: Context, options: GenerationOptions, args: Namespace, num_images: int, model: str):
        self.context, self.options, self.args = context, options, args
        self.facts = {"geometry": args.geometry, "images": num_images, "model": model}
        self.scene = None
        self.refused: list[int] = []

    def answer(self, lines: Sequence[Line]) -> None:
        """Answer and print one batch after the other."""
        for start in range(0, len(lines), self.options.batch_size):
            batch = lines[start : start + self.options.batch_size]
            live = len(lines) == 1 and not self.args.json and sys.stdout.isatty()
            answers = self.context.ask_all([line.question for line in batch], self.options, _show if live else None)
            for line, answer in zip(batch, answers, strict=True):
                print("" if live else self._text(line, answer), flush=True)
                self.scene = self.scene or answer.scene

    def answer_lines(self, numbered: Iterator[tuple[int, bytes]]) -> None:
        """Answer the lines of a stream, a batch at a time; those that cannot be asked are told by number."""
        lines = self._askable(numbered)
        while batch := list(islice(lines, self.options.batch_size)):
            self.answer(batch)

    def finish(self) -> None:
        """Save the geometry, and fail if lines were refused."""
        if self.args.save_geometry is not None and self.scene is not None:
            for path in self.scene.export(self.args.save_geometry, overwrite=self.args.overwrite):
                log.info("wrote %s", path)
        if self.refused:
            why = f"lines {_some(self.refused)}; the others were"
            raise CheckFailed(f"{len(self.refused)} lines of stdin were not answered", why, "correct them")

    def _askable(self, numbered: Iterator[tuple[int, bytes]]) -> Iterator[Line]:
        parse: Callable[[str], Line] | None = None
        for number, raw in numbered:
            if not raw.strip():
                continue
            try:
                text = raw.decode("utf-8").strip()
                parse = parse or (_from_json if text.startswith("{") else _from_text)
                line = parse(text)
                self.context.turn(line.question, self.options)
            except (InputError, ValueError) as error:
                self.refused.append(number)
                reason = f"{error.what} ({error.why})" if isinstance(error, InputError) else str(error)
                log.error("line %d is not answered: %s", number, reason)
                continue
            yield line

    def _text(self, line: Line, answer: Answer) -> str:
        if not self.args.json:
            return answer.text
        said = {
            "question": line.question,
            "answer": answer.text,
            "tokens": answer.tokens,
            "finish": answer.finish,
            "seconds": round(answer.seconds, 3),
        }
        return json.dumps(line.facts | said | self.facts, ensure_ascii=False)


def _from_text(text: str) -> Line:
    if text.startswith("{"):
        raise InputError("JSON among plain questions", "the first line was plain", "give all lines in one way")
    return Line(text, {})


def _from_json(text: str) -> Line:
    """{"question": "..."}, and "id" to find the answer by; other fields are not looked at."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError("malformed JSON", str(error), "correct the line") from None
    if not isinstance(value, dict) or not isinstance(value.get("question"), str):
        raise InputError('no "question"', "a line is an object whose question is a text", "correct the line")
    return Line(value["question"], {"id": value["id"]} if "id" in value else {})


def _some(numbers: Sequence[int]) -> str:
    """The first ten."""
    return ", ".join(map(str, numbers[:10])) + (", ..." if len(numbers) > 10 else "")


def _show(_: int, piece: str) -> None:
    """The next piece of an answer, at once."""
    print(piece, end="", flush=True)


def _options(args: Namespace) -> GenerationOptions:
    return GenerationOptions(max_new_tokens=args.max_new_tokens, temperature=args.temperature, seed=args.seed)


def _load(args: Namespace) -> Pipeline:
    return load(args.model, args.device, dtype_of(args.dtype), max_context=args.max_context)


# ---------------------------------------------------------------------------------------------- chat

HELP = """\
/geometry on|off   with the geometric expert, or the semantic expert alone; begins a new conversation
/images PATHS      other photos; begins a new conversation
/reset             begin a new conversation about the same photos
/help              this list
/quit              the end
Anything else is said to the model, which remembers the conversation. <image> says where a photo stands."""


def chat(args: Namespace) -> None:
    """Talk until /quit or the end of the input.

    Raises:
        CheckFailed: lines of an input that is not a terminal could not be followed; the others were.
    """
    options = _options(args)
    sources = read_sources(args.images, args.max_views, args.skip_bad) if args.images else []
    talk = Conversation(_load(args), sources, args, options)
    if sys.stdin.isatty():
        log.info("%d photos, %s; /help lists what can be typed", len(sources), talk.pipeline.name)
        _talk_at_terminal(talk)
        return
    refused = []
    for number, raw in enumerate(sys.stdin.buffer, 1):
        if not talk.follow(raw.decode("utf-8", errors="replace").strip()):
            refused.append(number)
        if talk.ended:
            break
    if refused:
        why = f"lines {_some(refused)}; the others were"
        raise CheckFailed(f"{len(refused)} lines of stdin were not followed", why, "correct them")


def _talk_at_terminal(talk: "Conversation") -> None:
    """Until /quit or the end of the input. An interrupt ends the answer, or the talk when nothing is being answered."""
    while not talk.ended:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        try:
            talk.follow(line.strip())
        except KeyboardInterrupt:
            log.info("\ninterrupted; the conversation stands as before the question")


class Conversation:
    """Turns about the same photos, and the commands between them.

    Args:
        pipeline: the model.
        sources: the photos; may be none.
        args: the options of the command.
        options: how to answer.
    """

    def __init__(self, pipeline: Pipeline, sources: list[SourceImage], args: Namespace, options: GenerationOptions):
        self.pipeline, self.args, self.options = pipeline, args, options
        self.ended = False
        self._begin(sources, args.geometry)

    def follow(self, line: str) -> bool:
        """Do what one line says; a mistake in it is told, and nothing changes."""
        try:
            if line.startswith("/"):
                self._command(*line.split(maxsplit=1))
            elif line:
                self._say(line)
        except G2VLMError as error:
            print(f"error: {error}", file=sys.stderr)
            return False
        return True

    def _begin(self, sources: list[SourceImage], geometry: Geometry) -> None:
        """A new conversation."""
        self.context: Context = self.pipeline.context_of_sources(sources, geometry, width=self.args.width)
        self.sources = sources
        self.geometry: Geometry = geometry

    def _say(self, words: str) -> None:
        answer = self.context.ask(words, self.options, _show)
        print(flush=True)
        self.context = self.context.then(words, answer)

    def _command(self, name: str, rest: str = "") -> None:
        if name == "/geometry" and rest in ("on", "off"):
            self._begin(self.sources, rest)
            log.info("geometry %s, a new conversation", rest)
        elif name == "/images" and rest:
            self._begin(read_sources(_paths(rest), self.args.max_views, self.args.skip_bad), self.geometry)
            log.info("%d photos, a new conversation", len(self.sources))
        elif name == "/reset" and not rest:
            self._begin(self.sources, self.geometry)
            log.info("a new conversation")
        elif name == "/help" and not rest:
            print(HELP, file=sys.stderr)
        elif name == "/quit" and not rest:
            self.ended = True
        else:
            raise InputError(f"cannot follow  {name} {rest}".rstrip(), "it is none of the commands", "see /help")


def _paths(text: str) -> list[str]:
    """Names as a shell would split them."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise InputError(f"cannot follow  /images {text}", str(error), "close the quotation") from None
