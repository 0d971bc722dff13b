"""The elements of a JSON array, read as a stream: memory holds one block and one element."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

BLOCK = 1 << 20  # bytes that are read at once
BOM = b"\xef\xbb\xbf"
MARKS = re.compile(r'["\[\]{}]|\\.?', re.DOTALL)  # where texts, lists and objects begin and end; \" does not


class ArrayError(Exception):
    """The array cannot be read past a line."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(f"{line}: {reason}")
        self.line, self.reason = line, reason


@dataclass(frozen=True)
class Element:
    """One element of the array; `value` is meaningless where `fault` says why."""

    line: int  # on which it begins, from 1
    stop: int  # bytes of the stream up to its end
    lines: int  # newlines of the stream up to its end
    value: Any
    fault: str | None = None


def elements(stream: BinaryIO, *, inside: bool = False, whole: bool = True, limit: int) -> Iterator[Element]:
    """Yield the elements of an array. `inside`: the stream begins behind one of them; not `whole`: it ends behind one.

    ArrayError where nothing after a place can be told from the rest. An element of more than `limit` bytes is passed over, and is never
    held.
    """
    text = _Text(stream, bom=not inside)
    decode = json.JSONDecoder().raw_decode
    expected = "comma" if inside else "open"  # then "first", "comma" and "value" in turn
    while True:
        character = text.skip_space()
        if not character:
            if expected == "comma" and not whole:
                return
            raise ArrayError(text.line, "the array is cut off: its closing ] is missing")
        if expected == "open":  # whoever calls has seen the [
            text.advance(1)
            expected = "first"
        elif character == "]" and expected in ("first", "comma"):
            text.advance(1)
            if text.skip_space():
                raise ArrayError(text.line, "something follows the end of the array")
            return
        elif expected == "comma":
            if character != ",":
                raise ArrayError(text.line, "not valid JSON: a comma is missing between two rows")
            text.advance(1)
            expected = "value"
        else:
            try:
                value, end = decode(text.buffer, text.at)
            except (ValueError, RecursionError) as error:
                line = text.line
                if _unfinished(error, text.buffer):
                    if len(text.buffer) - text.at <= limit:
                        if text.more():
                            continue
                    elif text.pass_over():
                        yield Element(line, text.offset, text.line - 1, None, too_long(limit))
                        expected = "comma"
                        continue
                if isinstance(error, json.JSONDecodeError):
                    line += text.buffer.count("\n", text.at, error.pos)
                raise ArrayError(line, f"not valid JSON: {reason_of(error)}") from error
            if end == len(text.buffer) and text.more():  # a number may go on
                continue
            line, start = text.line, text.offset
            fault = text.advance(end - text.at)
            if text.offset - start > limit:
                value, fault = None, too_long(limit)
            yield Element(line, text.offset, text.line - 1, value, fault)
            expected = "comma"


def too_long(limit: int) -> str:
    """Why a row that is longer than any row is left out."""
    return f"longer than {limit >> 20} MiB"


def reason_of(error: Exception) -> str:
    """Why something is not JSON, in words."""
    if isinstance(error, json.JSONDecodeError):
        what = error.msg.removesuffix(" starting at")
        return f"{what[:1].lower()}{what[1:]}, column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


class _Text:
    """A stream as text, with a place in it. Bytes that are not UTF-8 become half surrogates, as Python calls them."""

    def __init__(self, stream: BinaryIO, *, bom: bool) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.buffer = ""
        self.at = 0  # in the buffer
        self.offset = 0  # in the stream, in bytes
        self.line = 1
        if bom:
            head = stream.read(len(BOM))
            if head == BOM:
                self.offset = len(BOM)
            else:
                self.buffer = self._decoder.decode(head)

    def more(self) -> bool:
        """Read on, doubling what is held; False at the end of the stream."""
        held = self.buffer[self.at :]
        data = self._stream.read(max(len(held), BLOCK))
        self.buffer, self.at = held + self._decoder.decode(data, final=not data), 0
        return bool(data)

    def skip_space(self) -> str:
        """Go to the next character that is no space, and return it; "" at the end of the stream."""
        while True:
            start, buffer = self.at, self.buffer
            while self.at < len(buffer) and buffer[self.at] in " \t\r\n":
                self.at += 1
            self.offset += self.at - start
            self.line += buffer.count("\n", start, self.at)
            if self.at < len(buffer):
                return buffer[self.at]
            if not self.more() and not self.buffer:
                return ""

    def pass_over(self) -> bool:
        """Go behind the list, object or text that begins here; False where the stream ends before it does."""
        depth, quoted = 0, False
        while True:
            end = len(self.buffer)
            for found in MARKS.finditer(self.buffer, self.at):
                mark = found[0]
                if mark == "\\":  # what it escapes is not here yet
                    end = found.start()
                elif mark == '"':
                    quoted = not quoted
                elif not quoted:
                    depth += (mark in "[{") - (mark in "]}")
                if mark in '"]}' and not quoted and depth <= 0:
                    self.advance(found.end() - self.at)
                    return True
            self.advance(end - self.at)
            if not self.more():
                return False

    def advance(self, characters: int) -> str | None:
        """Go on; return what is wrong with the bytes that were passed."""
        passed = self.buffer[self.at : self.at + characters]
        self.at += characters
        self.line += passed.count("\n")
        try:
            self.offset += len(passed.encode())
        except UnicodeEncodeError as error:
            self.offset += len(passed.encode(errors="surrogateescape"))
            return f"not UTF-8: byte 0x{ord(passed[error.start]) - 0xDC00:02x}"
        return None


def _unfinished(error: Exception, buffer: str) -> bool:
    """True when more of the stream may complete a value that could not be read."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.msg.startswith("Unterminated string") or error.pos > len(buffer) - 16
