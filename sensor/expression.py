"""What a caller wants to see of an event: comparisons of its fields, joined by AND and OR.

An expression is a tree of frozen dataclasses. It comes from the API's FilterExpression
(from_message) or from text (parse), and goes back to either. Nothing here knows a kernel, a
record or C; program.py makes an expression ready for one kernel event.

The text, which str() also writes:

    expression = conjunction { "||" conjunction }
    conjunction = term { "&&" term }
    term       = "(" expression ")" | "true" | "false" | FIELD operator value
    operator   = "==" | "!=" | "<" | "<=" | ">" | ">=" | "~"
    value      = 443 | -1 | 0x1bb | 0o17 | "text" | 'text' | AF_INET | 10.0.0.1 | fe80::1

`~` compares with a wildcard: only `*` at the beginning and at the end of the text count. In a
quoted text `\\` escapes: \\" \\' \\\\ \\n \\r \\t \\xHH. An address compares with sin_addr or
sin6_addr (short for sin6_addr_high and sin6_addr_low), by == and != only. Ports are in host
order, as in events.

Integers compare as numbers, whatever the sign and width of the field: `port < 100000` is true
of every port. A field that an event does not have makes its comparison false, != too.
"""

from __future__ import annotations

import ipaddress
import operator
import re
import socket
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, TypeAlias

from ringside.api.v0 import (
    FilterExpression,
    FilterExpressionFilterExpressionType,
    FilterPredicate,
    FilterPredicatePredicateType,
    FilterPredicateValueType,
)

from .errors import RequestError
from .glob import STAR, Glob, glob_match, parse_glob, quote, render

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

MAX_TERMS = 512  # comparisons in one expression
MAX_DEPTH = 32  # of AND within OR within AND; a long chain of one kind has no depth
MAX_STRING = 4096  # bytes of one text: no path is longer
MAX_PATTERN = 1024  # bytes of one wildcard text: matching costs pattern times text at worst
MAX_TEXT = 65536  # characters of an expression as text

_INT_MIN, _INT_MAX = -(1 << 63), (1 << 64) - 1


class Op(Enum):
    """How a field compares with a value."""

    EQ = "=="
    NE = "!="
    LT = "<"
    LE = "<="
    GT = ">"
    GE = ">="
    GLOB = "~"  # the API's: wildcards only at the ends
    MATCH = "=~"  # a full shell glob, for the API's *_pattern fields
    BITS = "&"  # one of these bits is set, for the API's *_mask fields

    # identity instead of Enum's hash of the name: expressions are hashed a lot
    __hash__ = object.__hash__


_TEXT_OPS = frozenset({Op.EQ, Op.NE, Op.GLOB, Op.MATCH})
_INT_OPS = frozenset({Op.EQ, Op.NE, Op.LT, Op.LE, Op.GT, Op.GE, Op.BITS})


@dataclass(frozen=True, slots=True)
class Predicate:
    """One comparison; `value` has the type that `op` and the field ask for."""

    op: Op
    field: str
    value: int | str

    def __post_init__(self) -> None:
        if self.op not in (_INT_OPS if isinstance(self.value, int) else _TEXT_OPS):
            raise ValueError(f"{self.op.value} does not compare with {self.value!r}")

    @property
    def number(self) -> int:
        """The value of a comparison of numbers; TypeError of one of texts."""
        if isinstance(self.value, int):
            return self.value
        raise TypeError(f"{self}: compares texts")

    @property
    def text(self) -> bytes:
        """The value of a comparison of texts, as the kernel holds it; TypeError of one of numbers."""
        if isinstance(self.value, str):
            return to_bytes(self.value)
        raise TypeError(f"{self}: compares numbers")

    def __str__(self) -> str:
        return f"{self.field} {self.op.value} {_show(self)}"


@dataclass(frozen=True, slots=True)
class And:
    """All of the terms; none of them is an And."""

    terms: tuple[Expression, ...]

    def __str__(self) -> str:
        return " && ".join(f"({term})" if isinstance(term, Or) else str(term) for term in self.terms)


@dataclass(frozen=True, slots=True)
class Or:
    """One of the terms; none of them is an Or."""

    terms: tuple[Expression, ...]

    def __str__(self) -> str:
        return " || ".join(str(term) for term in self.terms)


@dataclass(frozen=True, slots=True)
class Const:
    """Always true or always false; never a term of an And or Or."""

    value: bool

    def __str__(self) -> str:
        return "true" if self.value else "false"


Expression: TypeAlias = Predicate | And | Or | Const

TRUE, FALSE = Const(True), Const(False)


def all_of(terms: Iterable[Expression]) -> Expression:
    """The AND of the terms: flat, without constants and repetitions, no And around a single one."""
    return _join(And, terms, neutral=TRUE, absorbing=FALSE)


def any_of(terms: Iterable[Expression]) -> Expression:
    """The OR of the terms, normalized likewise."""
    return _join(Or, terms, neutral=FALSE, absorbing=TRUE)


def _join(kind: type[And | Or], terms: Iterable[Expression], neutral: Const, absorbing: Const) -> Expression:
    flat: dict[Expression, None] = {}
    for term in terms:
        if term == absorbing:
            return absorbing
        if isinstance(term, kind):
            flat.update(dict.fromkeys(term.terms))
        elif term != neutral:
            flat[term] = None
    if not flat:
        return neutral
    return kind(tuple(flat)) if len(flat) > 1 else next(iter(flat))


def predicates(expression: Expression) -> list[Predicate]:
    """All comparisons, from left to right."""
    if isinstance(expression, Predicate):
        return [expression]
    if isinstance(expression, Const):
        return []
    return [found for term in expression.terms for found in predicates(term)]


# ---- the meaning


def glob_of(predicate: Predicate) -> Glob:
    """What a GLOB or MATCH predicate accepts, or the text of an EQ or NE, as a glob."""
    text = predicate.text
    if predicate.op is Op.MATCH:
        return parse_glob(text)
    if predicate.op is not Op.GLOB:
        return quote(text)
    middle = text.strip(b"*")
    if not middle:
        return (STAR,) if text else ()
    return (
        ((STAR,) if text.startswith(b"*") else ()) + quote(middle) + ((STAR,) if text.endswith(b"*") else ())
    )


def to_bytes(text: str) -> bytes:
    """A text as the kernel holds it."""
    return text.encode("utf-8", "surrogateescape")


_COMPARE: dict[Op, Callable[[int, int], bool]] = {
    Op.EQ: operator.eq,
    Op.NE: operator.ne,
    Op.LT: operator.lt,
    Op.LE: operator.le,
    Op.GT: operator.gt,
    Op.GE: operator.ge,
    Op.BITS: lambda have, mask: have & mask != 0,
}


def evaluate(expression: Expression, values: Mapping[str, int | str | bytes | None]) -> bool:
    """Whether an event with these field values is wanted; None and missing fields are absent.

    TypeError if a text is compared with a number.
    """
    match expression:
        case Const(value):
            return value
        case And(terms):
            return all(evaluate(term, values) for term in terms)
        case Or(terms):
            return any(evaluate(term, values) for term in terms)
        case Predicate():
            have = values.get(expression.field)
            return have is not None and _holds(expression, have)


def _holds(predicate: Predicate, have: int | str | bytes) -> bool:
    if isinstance(have, int):
        return _COMPARE[predicate.op](have, predicate.number)
    text = to_bytes(have) if isinstance(have, str) else have
    if predicate.op in (Op.EQ, Op.NE):
        return (text == predicate.text) is (predicate.op is Op.EQ)
    return glob_match(render(glob_of(predicate)), text)


# ---- from and to the API's messages

_PREDICATE_TYPES = {
    FilterPredicatePredicateType.EQ: Op.EQ,
    FilterPredicatePredicateType.NE: Op.NE,
    FilterPredicatePredicateType.LT: Op.LT,
    FilterPredicatePredicateType.LE: Op.LE,
    FilterPredicatePredicateType.GT: Op.GT,
    FilterPredicatePredicateType.GE: Op.GE,
    FilterPredicatePredicateType.GLOB: Op.GLOB,
}
_TYPE_OF_OP = {op: kind for kind, op in _PREDICATE_TYPES.items()}
_VALUE_FIELDS = {
    FilterPredicateValueType.SIGNED: "signed_value",
    FilterPredicateValueType.UNSIGNED: "unsigned_value",
    FilterPredicateValueType.STRING: "string_value",
}


def from_message(
    message: FilterExpression, path: str = "filter", fields: Mapping[str, type[int | str]] | None = None
) -> Expression:
    """The expression of a message; RequestError, with the path of the faulty field, if it is not sound.

    `fields` are the names that the event has and what they hold; None accepts every name.
    Does not recurse before the depth is known to be bounded.
    """
    # A node in work is (kind, terms, depth): flat lists of one kind, so a chain stays shallow.
    todo: list[type[And | Or] | tuple[FilterExpression | None, str]] = [(message, path)]
    done: list[tuple[type[And | Or] | None, list[Expression], int]] = []
    count = 0
    while todo:
        item = todo.pop()
        if not isinstance(item, tuple):
            right, left = done.pop(), done.pop()
            terms: list[Expression] = []
            depth = 1
            for kind, inner, inner_depth in (left, right):
                if kind is item:
                    terms += inner
                    depth = max(depth, inner_depth)
                else:
                    terms.append(_close(kind, inner))
                    depth = max(depth, inner_depth + 1)
            if depth > MAX_DEPTH:
                raise RequestError(path, f"nested deeper than {MAX_DEPTH}")
            done.append((item, terms, depth))
            continue
        node, at = item
        if node is None:
            raise RequestError(at, "is missing")
        if node.type == FilterExpressionFilterExpressionType.PREDICATE:
            count += 1
            if count > MAX_TERMS:
                raise RequestError(path, f"has more than {MAX_TERMS} predicates")
            done.append((None, [_predicate(node.predicate, f"{at}.predicate", fields)], 0))
        elif node.type == FilterExpressionFilterExpressionType.AND:
            todo += [And, (node.rhs, f"{at}.rhs"), (node.lhs, f"{at}.lhs")]
        elif node.type == FilterExpressionFilterExpressionType.OR:
            todo += [Or, (node.rhs, f"{at}.rhs"), (node.lhs, f"{at}.lhs")]
        else:
            raise RequestError(f"{at}.type", f"is {int(node.type)}, must be PREDICATE, AND or OR")
        if len(todo) > 2 * MAX_TERMS:
            raise RequestError(path, f"has more than {MAX_TERMS} predicates")
    kind, terms, _ = done.pop()
    return _close(kind, terms)


def _close(kind: type[And | Or] | None, terms: list[Expression]) -> Expression:
    if kind is None:
        return terms[0]
    return all_of(terms) if kind is And else any_of(terms)


def _predicate(
    message: FilterPredicate | None, at: str, fields: Mapping[str, type[int | str]] | None
) -> Expression:
    if message is None:
        raise RequestError(at, "is missing")
    value_field = _VALUE_FIELDS.get(message.value_type)
    if value_field is None:
        raise RequestError(
            f"{at}.value_type", f"is {int(message.value_type)}, must be SIGNED, UNSIGNED or STRING"
        )
    value: int | str | None = getattr(message, value_field)
    if value is None:
        raise RequestError(
            f"{at}.{value_field}", f"is missing, though value_type is {message.value_type.name}"
        )
    if message.type == FilterPredicatePredicateType.CONST:
        return TRUE if value else FALSE
    op = _PREDICATE_TYPES.get(message.type)
    if op is None:
        raise RequestError(
            f"{at}.type", f"is {int(message.type)}, must be CONST, EQ, NE, LT, LE, GT, GE or GLOB"
        )
    problem = _name_problem(message.field_name, fields)
    if problem:
        raise RequestError(f"{at}.field_name", problem)
    if fields is not None and fields[message.field_name] is not type(value):
        holds = "a number" if fields[message.field_name] is int else "text"
        raise RequestError(
            f"{at}.value_type", f"is {message.value_type.name}, but {message.field_name} is {holds}"
        )
    problem = _value_problem(op, value)
    if problem:
        raise RequestError(f"{at}.{value_field}", problem)
    return Predicate(op, message.field_name, value)


def _name_problem(name: str, fields: Mapping[str, type[int | str]] | None) -> str:
    if not name:
        return "is missing"
    if fields is not None and name not in fields:
        return f"{_quoted(name[:64])} is not a field of this event; it has {', '.join(fields)}"
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        return f"{_quoted(name[:64])} is not a name"
    return ""


def _value_problem(op: Op, value: int | str) -> str:
    """What is wrong with comparing so with this value; empty if nothing is."""
    if isinstance(value, int):
        if op not in _INT_OPS:
            return f"is a number, and {op.value} compares text"
        return "" if _INT_MIN <= value <= _INT_MAX else "does not fit 64 bits"
    if op not in _TEXT_OPS:
        return f"is text, and {op.value} compares numbers"
    longest = MAX_PATTERN if op in (Op.GLOB, Op.MATCH) else MAX_STRING
    length = len(to_bytes(value))
    return "" if length <= longest else f"is {length} bytes long, at most {longest} are possible"


def to_message(expression: Expression) -> FilterExpression:
    """The API's message; ValueError for MATCH and BITS, which it can't carry.

    Chains become balanced trees: a parser's limit on nesting is not met by their length.
    """
    match expression:
        case Const(value):
            return FilterExpression(
                predicate=FilterPredicate(
                    value_type=FilterPredicateValueType.UNSIGNED, unsigned_value=int(value)
                )
            )
        case And(terms):
            return _balanced(FilterExpressionFilterExpressionType.AND, [to_message(term) for term in terms])
        case Or(terms):
            return _balanced(FilterExpressionFilterExpressionType.OR, [to_message(term) for term in terms])
    if expression.op not in _TYPE_OF_OP:
        raise ValueError(f"{expression}: a FilterExpression has no such comparison")
    message = FilterPredicate(type=_TYPE_OF_OP[expression.op], field_name=expression.field)
    if isinstance(expression.value, str):
        message.value_type, message.string_value = FilterPredicateValueType.STRING, expression.value
    elif expression.value < 0:
        message.value_type, message.signed_value = FilterPredicateValueType.SIGNED, expression.value
    else:
        message.value_type, message.unsigned_value = FilterPredicateValueType.UNSIGNED, expression.value
    return FilterExpression(predicate=message)


def _balanced(kind: FilterExpressionFilterExpressionType, terms: list[FilterExpression]) -> FilterExpression:
    while len(terms) > 1:
        pairs = [
            FilterExpression(type=kind, lhs=lhs, rhs=rhs)
            for lhs, rhs in zip(terms[0::2], terms[1::2], strict=False)
        ]
        terms = pairs + terms[len(pairs) * 2 :]
    return terms[0]


# ---- from and to text


class ParseError(RequestError):
    """The text is not an expression; the message shows the place."""

    def __init__(self, text: str, position: int, problem: str) -> None:
        start = max(0, position - 60)
        line = "".join(char if char.isprintable() else "?" for char in text[start : position + 60])
        super().__init__("filter", f"{problem}\n  {line}\n  {' ' * (position - start)}^")
        self.text = text
        self.position = position


_TOKEN = re.compile(
    r"""\s*(?:
      (?P<ipv6>[0-9A-Fa-f]*:[0-9A-Fa-f:.]*)
    | (?P<ipv4>\d+\.[\d.]+)
    | (?P<int>-?(?:0[xX][0-9a-fA-F]+|0o[0-7]+|\d+)(?!\w))
    | (?P<text>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
    | (?P<name>[A-Za-z_]\w*)
    | (?P<op>==|!=|<=|>=|<|>|~)
    | (?P<sign>&&|\|\||\(|\))
    | (?P<end>$)
    | (?P<bad>.)
    )""",
    re.VERBOSE | re.DOTALL,
)
_FAMILIES = {"AF_UNIX": 1, "AF_LOCAL": 1, "AF_INET": 2, "AF_INET6": 10}
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t"}


def parse(text: str) -> Expression:
    """The expression that a text says; ParseError, a RequestError, if it says none."""
    if len(text) > MAX_TEXT:
        raise RequestError("filter", f"is {len(text)} characters long, at most {MAX_TEXT} are possible")
    return _Parser(text).whole()


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.kind = ""
        self.word = ""
        self.start = 0
        self.end = 0
        self.terms = 0
        self.advance()

    def advance(self) -> None:
        found = _TOKEN.match(self.text, self.end)
        if found is None or found.lastgroup is None:  # the last alternatives match anything
            raise AssertionError(self.text)
        self.kind, self.word = found.lastgroup, found[found.lastgroup]
        self.start, self.end = found.span(found.lastgroup)
        if self.kind == "bad":
            raise self.error(_MISTAKES.get(self.word, f"unexpected {self.word!r}"))

    def error(self, problem: str) -> ParseError:
        return ParseError(self.text, self.start, problem)

    def unexpected(self, wanted: str) -> ParseError:
        return self.error(
            f"expected {wanted}, found {self.word!r}" if self.word else f"expected {wanted} here"
        )

    def whole(self) -> Expression:
        expression = self.disjunction(0)
        if self.kind != "end":
            raise self.unexpected("&&, || or the end")
        return expression

    def disjunction(self, depth: int) -> Expression:
        terms = [self.conjunction(depth)]
        while self.word == "||" and self.kind == "sign":
            self.advance()
            terms.append(self.conjunction(depth))
        return any_of(terms)

    def conjunction(self, depth: int) -> Expression:
        terms = [self.term(depth)]
        while self.word == "&&" and self.kind == "sign":
            self.advance()
            terms.append(self.term(depth))
        return all_of(terms)

    def term(self, depth: int) -> Expression:
        if self.kind == "sign" and self.word == "(":
            if depth >= MAX_DEPTH // 2:
                raise self.error(f"parentheses nested deeper than {MAX_DEPTH // 2}")
            self.advance()
            expression = self.disjunction(depth + 1)
            if self.word != ")" or self.kind != "sign":
                raise self.unexpected("&&, || or )")
            self.advance()
            return expression
        if self.kind != "name":
            raise self.unexpected("the name of a field")
        self.terms += 1
        if self.terms > MAX_TERMS:
            raise self.error(f"more than {MAX_TERMS} comparisons")
        name = self.word
        self.advance()
        if name in ("true", "false"):
            return TRUE if name == "true" else FALSE
        if self.kind != "op":
            raise self.unexpected("==, !=, <, <=, >, >= or ~")
        op, at = Op(self.word), self.start
        self.advance()
        expression = self.comparison(name, op, at)
        self.advance()
        return expression

    def comparison(self, name: str, op: Op, at: int) -> Expression:
        if self.kind in ("ipv4", "ipv6"):
            return self.address(name, op, at)
        value: int | str
        if self.kind == "int":
            digits = self.word.lstrip("-")
            if len(digits) > 1 and digits[0] == "0" and digits.isdigit():
                raise self.error("a number with leading zeros; write 0o17 for octal")
            value = int(self.word, 0)
        elif self.kind == "text":
            value = self.unescaped()
        elif self.kind == "name" and self.word in _FAMILIES:
            value = _FAMILIES[self.word]
        elif self.kind == "name":
            raise self.error(f"{self.word} is no value; a text needs quotes")
        else:
            raise self.unexpected("a value")
        problem = _value_problem(op, value)
        if problem:
            raise self.error(f"{self.word[:32]} {problem}")
        return Predicate(op, name, value)

    def address(self, name: str, op: Op, at: int) -> Expression:
        wanted = "sin_addr" if self.kind == "ipv4" else "sin6_addr"
        try:
            packed = ipaddress.ip_address(self.word).packed
        except ValueError:
            raise self.error(f"{self.word!r} is not an address") from None
        if name != wanted:
            raise self.error(f"{name} is not an address; {wanted} is")
        if op not in (Op.EQ, Op.NE):
            raise ParseError(self.text, at, "addresses compare only by == and !=")
        if self.kind == "ipv4":
            return Predicate(op, name, int.from_bytes(packed, "little"))
        halves = [
            Predicate(op, "sin6_addr_high", int.from_bytes(packed[:8], "little")),
            Predicate(op, "sin6_addr_low", int.from_bytes(packed[8:], "little")),
        ]
        return all_of(halves) if op is Op.EQ else any_of(halves)

    def unescaped(self) -> str:
        inner = self.word[1:-1]
        out = bytearray()
        at = 0
        while at < len(inner):
            char = inner[at]
            at += 1
            if char != "\\":
                out += to_bytes(char)
                continue
            char = inner[at]
            at += 1
            if char == "x" and re.match(r"[0-9a-fA-F]{2}", inner[at:]):
                out.append(int(inner[at : at + 2], 16))
                at += 2
            elif char in "\\\"'":
                out += to_bytes(char)
            elif char in _ESCAPES:
                out += to_bytes(_ESCAPES[char])
            else:
                self.start += at
                raise self.error(f"unknown escape \\{char}")
        return out.decode("utf-8", "surrogateescape")


_MISTAKES = {
    "=": "a comparison is written ==",
    "!": "there is no not; use != or the opposite comparison",
    "&": "an and is written &&",
    "|": "an or is written ||",
    '"': "the text is not closed",
    "'": "the text is not closed",
}


def _show(predicate: Predicate) -> str:
    field, value = predicate.field, predicate.value
    if isinstance(value, str):
        return _quoted(value)
    if field == "sin_addr" and predicate.op in (Op.EQ, Op.NE) and 0 <= value < 1 << 32:
        return socket.inet_ntoa(value.to_bytes(4, "little"))
    return hex(value) if field.startswith("sin6_addr") and value >= 0 else str(value)


def _quoted(text: str) -> str:
    """The text as parse() reads it; what is not printable is escaped."""
    out = []
    for char in text:
        if char in '"\\':
            out.append("\\" + char)
        elif char.isprintable():
            out.append(char)
        else:
            out += [f"\\x{byte:02x}" for byte in to_bytes(char)]
    return '"' + "".join(out) + '"'
