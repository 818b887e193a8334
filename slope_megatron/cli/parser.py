"""What all commands' parsers share: one sentence for wrong usage, and the exit codes in each manual page."""

import argparse
import difflib
import sys
from pathlib import Path
from typing import NoReturn

BAD_INPUT = 2
EXIT_CODES = """\
exit codes:
    0  done
    2  bad input: one sentence on standard error says what, and the way out
  130  interrupted from the keyboard
"""


class Manual(argparse.RawDescriptionHelpFormatter):
    """Paragraphs and examples as they are written; a value is named by what it is, not by its flag once more."""

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        # As argparse.MetavarTypeHelpFormatter, for the types that say something.
        for kind, name in ((int, "INT"), (float, "FLOAT"), (Path, "PATH")):
            if action.type is kind:
                return name
        return super()._get_default_metavar_for_optional(action)


class Parser(argparse.ArgumentParser):
    """Prints one sentence about wrong usage, not the usage of a hundred flags; names the flag that was meant."""

    def __init__(self, *arguments, **settings):
        # A prefix of a flag is a typing error, not a flag.
        settings.setdefault("formatter_class", Manual)
        settings.setdefault("allow_abbrev", False)
        super().__init__(*arguments, **settings)
        # Flags of other programs that this parser has under another name.
        self.synonyms: dict[str, str] = {}

    def error(self, message: str) -> NoReturn:
        """One sentence on standard error; exit code 2."""
        print(f"{self.prog}: error: {message}; see {self.prog} --help", file=sys.stderr)
        sys.exit(BAD_INPUT)

    def parse_known_args(self, args=None, namespace=None):
        """As argparse's, but what is left over ends here, in the command that it was given to.

        A parser with `rest_is_mine` in its defaults (`slope bench gemm`) hands it on instead.
        """
        namespace, rest = super().parse_known_args(args, namespace)
        if rest and not getattr(namespace, "rest_is_mine", False):
            self.error(f"unrecognized arguments: {' '.join(rest)}{self.hint(rest)}")
        return namespace, rest

    def hint(self, rest: list[str]) -> str:
        """The flag that was meant by the first one that this parser does not have, if one is near."""
        known = [name for action in self._actions for name in action.option_strings]
        flags = [word.split("=")[0] for word in rest if word.startswith("-")]
        if flags and flags[0] in self.synonyms:
            return f" (did you mean {self.synonyms[flags[0]]}?)"
        near = difflib.get_close_matches(flags[0], known, n=1, cutoff=0.7) if flags else []
        return f" (did you mean {near[0]}?)" if near else ""


def manual(examples: str, codes: str = EXIT_CODES) -> str:
    """The end of a manual page: examples, then exit codes."""
    return f"{examples.rstrip()}\n\n{codes}"
