"""Cells of CSV files, whose file names spreadsheets could take for formulas, and terminals for commands.

A text that begins with one of = + - @ and is no number, that begins with an apostrophe, or that holds control
characters gets an apostrophe before it, which spreadsheets take for the mark of a text. Its control characters are
written as \\xNN, and its backslashes twice.
"""

import re

_FORMULA = ("=", "+", "-", "@", "'")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_ESCAPED = re.compile(r"\\(\\|x[0-9a-f]{2}|u[0-9a-f]{4})")


def quote(text: str) -> str:
    """Return the cell of a text."""
    if not _CONTROL.search(text) and (not text.startswith(_FORMULA) or _is_number(text)):
        return text
    return "'" + _CONTROL.sub(_escape, text.replace("\\", "\\\\"))


def unquote(cell: str) -> str:
    """Return the text of a cell."""
    return _ESCAPED.sub(_unescape, cell[1:]) if cell.startswith("'") else cell


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def _unescape(found: re.Match[str]) -> str:
    return "\\" if found[1] == "\\" else chr(int(found[1][1:], 16))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
