"""Structured log lines in which nothing of one person fits: one JSON object a line, of known keys with checked values.

    {"at": "2026-01-31T12:00:00.000000Z", "level": "info", "part": "rounds", "event": "round released", "round": 3}

What is written is decided here and not where something is logged, and what is not known to be harmless is left out:

    event            our own, as it stands in the source, with numbers put into it and "…" for anything else
    other keys       those of ALLOWED, if their value is of the kind named there
    an exception     its type and the lines it came by; of a PenchantError its message too (errors.py: no person's)
    a library's      from WARNING up, as the library's name and the level; its words may hold ids and addresses
    every text       without what is quoted, long numbers, hashes, tokens, addresses

    log.info("round released", extra={"round": 3, "answered": 41})
"""

from __future__ import annotations

import logging
import logging.handlers
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TextIO

import structlog
from structlog.stdlib import ProcessorFormatter
from structlog.typing import EventDict, Processor

from penchant.common.errors import PenchantError
from penchant.server.monitoring import CHANNELS, PHASES, REASONS

Part = Literal["services", "rounds", "supervisor"]
OURS = "penchant"
MAX_BYTES, KEPT = 16 << 20, 4
"""Of one file, after which the next is begun, and how many older ones stay."""
MAX_TEXT = 400
_NAMES_SOMEBODY = re.compile(
    r"""(['"`]).*?\1"""  # what a message quotes came from outside
    r"|\b\d{1,3}(?:\.\d{1,3}){3}(?::\d+)?\b|\b(?:[0-9A-Fa-f]{0,4}:){3,}[0-9A-Fa-f:.]*"  # addresses
    r"|\bpt_[\w-]+|(?=[\w-]*\d)[A-Za-z0-9_-]{16,}|[A-Za-z0-9_-]{33,}|\d{9,}",  # tokens, keys, hashes, node ids
    re.DOTALL,
)
_DIGEST, _WORD = re.compile("[0-9a-f]{64}"), re.compile("[A-Za-z][A-Za-z _-]{0,39}")


def scrubbed(text: str) -> str:
    """A text without what could name somebody, on one line.

    >>> scrubbed("node 12345678901 sent 'film:7' from 10.0.0.7, 3 bytes")
    'node … sent … from …, 3 bytes'
    """
    return _NAMES_SOMEBODY.sub("…", " ".join(text[:MAX_TEXT].split()))


def _text(value: Any) -> Any:
    return scrubbed(value) if isinstance(value, str) else None


def _word(value: Any) -> Any:
    return value if isinstance(value, str) and _WORD.fullmatch(value) else None


def _digest(value: Any) -> Any:
    return value if isinstance(value, str) and _DIGEST.fullmatch(value) else None


def _number(value: Any) -> Any:
    return value if isinstance(value, int | float) and abs(value) < 1 << 31 else None  # a node's id is above


def _one_of(words: Collection[str]) -> Callable[[Any], Any]:
    return lambda value: value if value in words else None


def _refused(value: Any) -> Any:
    """Counts by reason; what is no reason of the round loop is "other"."""
    if not isinstance(value, Mapping):
        return _number(value)
    counts: Counter[str] = Counter()
    for reason, n in value.items():
        counts[reason if reason in REASONS else "other"] += _number(n) or 0
    return dict(counts)


ALLOWED: Mapping[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("round", "attempt", "version", "sequence", "n", "code", "status", "port", "seconds"), _number),
    **dict.fromkeys(("epsilon", "drawn", "asked", "answered", "silent", "size_bytes"), _number),
    **dict.fromkeys(("process", "action", "method"), _word),
    **dict.fromkeys(("reason", "why"), _text),
    "plan": _digest,
    "phase": _one_of(PHASES),
    "channel": _one_of(CHANNELS),
    "refused": _refused,
}
"""Keys that a line may have beside at, level, part, event, logger, error, lines; what makes their values safe."""


def configure(part: Part, out: Path | TextIO) -> None:
    """Has all that this process logs go to one place, through the rules above; again after imports, since libraries
    bring handlers of their own.

    Args:
        out: a file, which is turned over at MAX_BYTES, or a stream.
    """
    handler: logging.Handler
    if isinstance(out, Path):
        handler = logging.handlers.RotatingFileHandler(out, maxBytes=MAX_BYTES, backupCount=KEPT, encoding="utf-8")
    else:
        handler = logging.StreamHandler(out)
    stamp = structlog.processors.TimeStamper(fmt="iso", utc=True, key="at")
    dumps = structlog.processors.JSONRenderer(ensure_ascii=False)
    chain: list[Processor] = [_line(part), stamp, dumps]
    handler.setFormatter(ProcessorFormatter(processors=chain, use_get_message=False, pass_foreign_args=True))
    handler.addFilter(lambda record: _is_ours(record.name) or record.levelno >= logging.WARNING)
    root = logging.getLogger()
    for logger in (root, *(one for one in root.manager.loggerDict.values() if isinstance(one, logging.Logger))):
        for old in list(logger.handlers):
            logger.removeHandler(old)
            old.close()
        if logger is not root:
            logger.propagate = True
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    logging.raiseExceptions = False  # it would print the record itself
    logging.captureWarnings(True)
    structlog.configure(
        processors=[structlog.stdlib.add_log_level, ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    sys.excepthook = _uncaught
    threading.excepthook = lambda args: _uncaught(args.exc_type, args.exc_value, args.exc_traceback)


def _line(part: Part) -> Processor:
    def line(_: Any, __: str, said: EventDict) -> EventDict:
        record: logging.LogRecord = said["_record"]
        ours = _is_ours(record.name)
        values = dict(said) if said["_from_structlog"] else vars(record)
        kept: dict[str, Any] = {"level": record.levelname.lower(), "part": part}
        if ours:
            kept["event"] = scrubbed(str(said["event"])) if said["_from_structlog"] else _event(record.msg, said)
            for name, safe in ALLOWED.items():
                if name in values and (value := safe(values[name])) is not None:
                    kept[name] = value
        else:
            kept |= {"event": "a library's message", "logger": _word(record.name.split(".")[0]) or "other"}
        return kept | _exception(said.get("exc_info"))

    return line


def _event(message: object, said: Mapping[str, Any]) -> str:
    """The message without any text that was put into it."""
    event, given = scrubbed(str(message)), said["positional_args"]
    if not given:
        return event
    try:
        return event % tuple(_put(one) for one in (given if isinstance(given, tuple) else (given,)))
    except (TypeError, ValueError):  # "…" where a number should be
        return event


def _put(value: Any) -> Any:
    if isinstance(value, Mapping):
        return _refused(value)
    return "…" if _number(value) is None else value


def _is_ours(name: str) -> bool:
    return name.split(".")[0] == OURS


def _exception(info: Any) -> dict[str, Any]:
    """Type, lines and, of our own, message of an exception, given as `logging` and structlog take it."""
    if info is True:
        info = sys.exc_info()
    error = info[1] if isinstance(info, tuple) else info
    if not isinstance(error, BaseException):
        return {}
    lines, frame = [], error.__traceback__
    while frame is not None:
        lines.append(f"{Path(frame.tb_frame.f_code.co_filename).name}:{frame.tb_lineno}")
        frame = frame.tb_next
    said = {"why": scrubbed(str(error))} if isinstance(error, PenchantError) else {}
    return {"error": type(error).__name__, **said, "lines": lines[-8:]}


def _uncaught(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    if error is not None and not issubclass(kind, KeyboardInterrupt):
        logging.getLogger(OURS).critical("ended by an error", exc_info=(kind, error, trace))
