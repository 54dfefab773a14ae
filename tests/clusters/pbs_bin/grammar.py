"""What qsub accepts: options, directives, resources. After qsub.c, set_resource.c and ecl_verify_values.c of OpenPBS."""

import getopt
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

OPTIONS = "a:A:c:C:e:fhIj:J:k:l:m:M:N:o:p:q:r:R:S:u:v:VW:XzP:"
PREFIX = "#PBS"
MAX_NAME = 230

USAGE = """\
usage: qsub [-a date_time] [-A account_string] [-c interval]
\t[-C directive_prefix] [-e path] [-f ] [-h ] [-I [-X]] [-j oe|eo] [-J X-Y[:Z]]
\t[-k keep] [-l resource_list] [-m mail_options] [-M user_list]
\t[-N jobname] [-o path] [-p priority] [-P project] [-q queue] [-r y|n]
\t[-R o|e|oe] [-S path] [-u user_list] [-W otherattributes=value...]
\t[-v variable_list] [-V ] [-z] [script | -- command [arg1 ...]]
       qsub --version
"""

BAD_VALUE, UNKNOWN_RESOURCE, BAD_CHUNK_RESOURCE, MIXED_RESOURCE, NO_ATTRIBUTE = 15014, 15035, 15108, 15109, 15002
"""PBSE_ numbers of pbs_error.h; a program's status is the number's lowest eight bits."""

COUNTS = ("ncpus", "ngpus", "mpiprocs", "ompthreads")
SIZES = ("mem", "vmem", "pmem", "pvmem", "file")
TIMES = ("walltime", "cput", "pcput")
WORDS = ("host", "vnode", "arch", "place", "select")
IN_CHUNKS = (*COUNTS, "mem", "vmem", "host", "vnode", "arch")
NOT_BESIDE_SELECT = (*COUNTS, "mem", "vmem")

TIME = re.compile(r"(\d+:){0,2}\d*(\.\d*)?")
SIZE = re.compile(r"\d+[kmgtp]?[bw]?", re.IGNORECASE)
NAME = re.compile(r"[A-Za-z0-9_+.-]+")

ATTRIBUTES: dict[str, Callable[[str], bool]] = {
    "j": lambda value: value in ("oe", "eo", "n"),
    "k": lambda value: re.fullmatch("[oed]*[oe][oed]*|n+d?n*", value) is not None,
    "m": lambda value: value == "n" or (re.fullmatch("[abe]+", value) is not None),
    "p": lambda value: re.fullmatch(r"[+-]?\d+", value) is not None and -1024 <= int(value) <= 1023,
    "R": lambda value: re.fullmatch("[oe]{1,2}", value) is not None,
    "N": lambda value: NAME.fullmatch(value) is not None,
    "S": lambda value: value.startswith("/"),
}
KEYWORDS = ("umask", "block", "group_list", "sandbox", "run_count", "depend", "stagein", "stageout")


class Refused(Exception):
    """qsub's own message, and the status that it leaves with."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status & 0xFF


@dataclass
class Request:
    """What a job asks for: options by letter, resources by name, and the chunks of its select statement."""

    options: dict[str, str] = field(default_factory=dict)
    resources: dict[str, str] = field(default_factory=dict)
    attributes: dict[str, str] = field(default_factory=dict)

    @property
    def chunks(self) -> list[dict[str, int]]:
        """One entry a chunk; those of `4:ncpus=2` are four. Only the counted resources."""
        found = []
        for chunk in self.resources["select"].split("+"):
            number, rest = re.fullmatch(r"\s*(\d*)\s*:?(.*)", chunk, re.DOTALL).groups()  # type: ignore[union-attr]
            pairs = dict(pair.split("=", 1) for pair in rest.split(":") if pair)
            counts = {name: int(pairs[name]) for name in COUNTS if name in pairs}
            found += [counts] * int(number or 1)
        return found

    @property
    def walltime_seconds(self) -> int | None:
        """None if the job names no limit."""
        value = self.resources.get("walltime")
        return seconds(value) if value else None


def seconds(value: str) -> int:
    """`[[HH:]MM:]SS[.fraction]`, rounded as PBS does."""
    total = 0.0
    for part in value.split(":"):
        total = total * 60 + float(part or 0)
    return int(total + 0.5)


def read(words: Sequence[str], script: str, prefix: str = PREFIX) -> Request:
    """The request of `qsub words` (without the script's name) for this script.

    Raises:
        Refused: as qsub refuses it.
    """
    request = Request()
    _take(request, words, from_directive=False)
    given = set(request.options)
    for directive in directives(script, prefix):
        arguments = split(directive)
        try:
            _take(request, arguments, from_directive=True, given=given)
        except Refused as refused:
            if refused.status == 2:  # not an error of this directive alone
                raise
            joined = "".join(f"{word} " for word in arguments)
            raise Refused(f"{refused}qsub: directive error: {joined}\n", 1) from None
    _verify(request)
    return request


def directives(script: str, prefix: str = PREFIX) -> list[str]:
    """The directives' text, the prefix removed: those before the first line that a shell would run."""
    found: list[str] = []
    lines = iter(script.splitlines(keepends=True))
    for line in lines:
        if line.endswith("\r\n"):
            raise Refused("qsub: script contains cr, lf\n", 1)
        if line.lstrip().startswith(prefix):
            text = line
            while text.rstrip("\n").endswith("\\"):
                text = text.rstrip("\n")[:-1] + next(lines, "")
            found.append(text.lstrip()[len(prefix) :])
        elif _is_run(line):
            break
    return found


def _is_run(line: str) -> bool:
    if line.startswith((":", "#!")):
        return False
    return bool(line.strip()) and not line.lstrip().startswith("#")


def split(text: str) -> list[str]:
    """A directive's words; quotes and backslashes as in make_argv() of qsub.c, which is no shell."""
    words: list[str] = []
    word, position, begun, text = "", 0, False, text.strip()
    while position < len(text):
        letter = text[position]
        if letter in "\"'":
            end = text.find(letter, position + 1)
            if end < 0:
                raise Refused("qsub: unmatched \0\n", 1)
            word, position, begun = word + text[position + 1 : end], end + 1, True
            continue
        if letter == "\\":
            position += 1
            word, begun = word + text[position : position + 1], True
        elif letter.isspace():
            if begun:
                words.append(word)
            word, begun = "", False
        else:
            word, begun = word + letter, True
        position += 1
    return [*words, word] if begun else words


def _take(request: Request, words: Sequence[str], from_directive: bool, given: set[str] | None = None) -> None:
    """Note the options of a command line or a directive. The command line goes first; later directives win over earlier
    ones, but a resource is taken where it is named first."""
    usage = 1 if from_directive else 2
    try:
        pairs, rest = getopt.gnu_getopt(list(words), OPTIONS)
    except getopt.GetoptError as error:
        what = "option requires an argument" if "requires" in error.msg else "invalid option"
        raise Refused(f"qsub: {what} -- '{error.opt}'\n{'' if from_directive else USAGE}", usage) from None
    if rest:
        raise Refused("" if from_directive else USAGE, usage)
    for option, value in pairs:
        letter = option[1]
        if letter == "l":
            _take_resources(request, value)
        elif letter == "W":
            _take_attributes(request, value)
        elif letter not in (given or ()):
            if letter == "r" and value not in ("y", "n"):
                raise Refused("qsub: illegal -r value\n", usage)
            request.options[letter] = value.lstrip() if letter in "mp" else value


def _take_resources(request: Request, text: str) -> None:
    for item in split_list(text):
        name, equals, value = item.partition("=")
        name, value = name.strip(), value.strip()
        if not name or (equals and re.search(r"\s", value)) or item == "":
            raise Refused("qsub: illegal -l value\n", 1)
        request.resources.setdefault(name, value)


def _take_attributes(request: Request, text: str) -> None:
    for item in split_list(text):
        name, equals, value = item.partition("=")
        if not equals or not name.strip():
            raise Refused("qsub: illegal -W value\n", 1)
        request.attributes.setdefault(name.strip(), value.strip())


def split_list(text: str) -> list[str]:
    """A list's items: at commas that stand outside of quotes; the outer quotes are removed."""
    items, quote = [""], ""
    for letter in text:
        if letter == quote:
            quote = ""
        elif not quote and letter in "\"'":
            quote = letter
        elif not quote and letter == ",":
            items.append("")
            continue
        items[-1] += letter
    return [re.sub(r"(^|=)([\"'])(.*)\2$", r"\1\3", item, flags=re.DOTALL) for item in items]


def variables(text: str, env: dict[str, str]) -> dict[str, str]:
    """The variables of a `-v` list; a name without a value is taken from the submitter's environment."""
    found = {}
    for item in split_list(text):
        name, equals, value = item.partition("=")
        if not equals and name not in env:
            raise Refused("qsub: cannot send environment with the job\n", 1)
        found[name] = value if equals else env[name]
    return found


def _verify(request: Request) -> None:
    for letter, fits in ATTRIBUTES.items():
        value = request.options.get(letter)
        if value is None:
            continue
        if letter == "N" and len(value) > MAX_NAME:
            raise Refused("qsub: Job name is too long \n", 2)
        if not fits(value):
            raise Refused(f"qsub: illegal -{letter} value\n{USAGE}", 2)
    if any(name not in KEYWORDS for name in request.attributes):
        raise Refused(f"qsub: Error ({NO_ATTRIBUTE}) submitting job\n", NO_ATTRIBUTE)
    for name, value in request.resources.items():
        if name not in (*COUNTS, *SIZES, *TIMES, *WORDS):
            raise Refused(f"qsub: Unknown resource Resource_List.{name}\n", UNKNOWN_RESOURCE)
        if name == "select":
            _verify_select(value)
        elif not _fits(name, value):
            raise _bad(f" Resource_List.{name}")
        elif "select" in request.resources and name in NOT_BESIDE_SELECT:
            text = f'"-lresource=" cannot be used with "select" or "place", resource is: {name}'
            raise Refused(f"qsub: {text}\n", MIXED_RESOURCE)


def _verify_select(value: str) -> None:
    whole = " Resource_List.select"
    if not value or value.endswith("+"):
        raise _bad(whole)
    for chunk in value.split("+"):
        parts = chunk.strip().split(":")
        named = parts[1:] if re.fullmatch(r"\d+\s*", parts[0]) else parts
        for pair in named:
            name, equals, amount = pair.partition("=")
            if not equals or not re.match("[A-Za-z]", name):
                raise _bad(whole)
            if name not in (*COUNTS, *SIZES, *TIMES, *WORDS):
                raise Refused(f"qsub: Unknown resource: {name}\n", UNKNOWN_RESOURCE)
            if not _fits(name, amount):
                raise _bad(f" select.{name}")
            if name not in IN_CHUNKS:
                raise Refused(f'qsub: Resource invalid in "select" specification: {name}\n', BAD_CHUNK_RESOURCE)
        if len(parts) > len(named) and int(parts[0]) == 0:
            raise _bad("")


def _fits(name: str, value: str) -> bool:
    if name in COUNTS:
        return re.fullmatch(r"\d+", value) is not None
    if name in SIZES:
        return SIZE.fullmatch(value) is not None
    if name in TIMES:
        return TIME.fullmatch(value) is not None
    return value != ""


def _bad(name: str) -> Refused:
    return Refused(f"qsub: Illegal attribute or resource value{name}\n", BAD_VALUE)
