"""Text files that people and other programs wrote: decoded by their byte order mark, cut at `\\n` and `\\r\\n` alone.

`str.splitlines` also cuts at form feeds, U+0085, U+2028 and others, which are characters inside of texts.
"""

import codecs
import re
from pathlib import Path

# The four bytes of UTF-32's little-endian mark begin with UTF-16's two.
MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
LINE_END = re.compile("\r?\n")


def encoding_of(head: bytes) -> tuple[str, int]:
    """The encoding that the first bytes of a text tell, and the length of the mark; without one it is UTF-8."""
    return next(((name, len(mark)) for mark, name in MARKS if head.startswith(mark)), ("utf-8", 0))


def decode(content: bytes) -> str:
    """A text without its byte order mark; line ends stay what they are.

    Raises:
        UnicodeDecodeError: it is not in the encoding that its mark tells, or in UTF-8.
    """
    encoding, mark = encoding_of(content[:4])
    return content[mark:].decode(encoding)


def lines_of(text: str) -> list[str]:
    """The lines of a text without their ends; what stands behind the last end is a line if there is anything."""
    lines = LINE_END.split(text)
    return lines if lines[-1] else lines[:-1]


def read_text(path: Path) -> str:
    """What a text file holds, without a byte order mark.

    Raises:
        ValueError: it cannot be read, or is not in the encoding that its mark tells, or in UTF-8; names the file.
        FileNotFoundError: it does not exist.
    """
    try:
        return decode(path.read_bytes())
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): make it readable") from None
    except UnicodeDecodeError as error:
        raise ValueError(not_text(path, error)) from None


def not_text(path: Path | str, error: UnicodeDecodeError) -> str:
    """The sentence on a text that does not decode."""
    encoding = "UTF-8" if error.encoding == "utf-8" else error.encoding.upper().removesuffix("-LE").removesuffix("-BE")
    return f"{path} is not {encoding} (byte {error.start}): save it as UTF-8 text"
