"""Token rules of coco-caption's Penn Treebank tokenizer, as regular expressions.

Fitted to the output of the reference (release 3.4.1 with `-preserveLines -lowerCase`) for every word of up to five
letters before a full stop and next to an apostrophe, for every character of the basic plane, and for random strings of
parts of words, numbers, addresses and symbols. `tests/parity/test_caption_metrics.py` repeats some of the comparison.

A rule is a token and the context after it. As in a scanner generator, the rule with the longest match wins, context
included; among equals, the first. So the context is part of the match, `(token)context`, and not a look-ahead.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from dsmoe_vl.metrics.ptb_characters import DIGITS, LETTERS, MARKS, SYMBOLS


@dataclass(frozen=True)
class Rule:
    """`pattern` is `(token)context`; `emit` is the token's form, before lower-casing."""

    pattern: re.Pattern[str]
    emit: Callable[[str], str]


def _any(words: str) -> str:
    """A pattern for any of the words, ignoring case, longest first."""
    return "(?i:" + "|".join(sorted(map(re.escape, words.split()), key=len, reverse=True)) + ")"


# Abbreviations keep their full stop. Those in the first list may end a sentence.
_ENDING = (
    "al ala apr ariz assn aug bancorp bhd bldg blvd bros calif colo conn co corp cos ct dak dec esq est etc ext feb fla"
    " fri ga inc ind intl jan jr jul jun kan kans ky ltd mar md mich minn mo mon mont neb nev nov oct okla penn plc rd"
    " rt sep sept seq sq sr sys tel tenn thu thurs tue tues univ va vt wed wis wisc wyo"
)
_ENDING_CAPITAL = "Ark Az Del Ill La Mass Miss Ore Pa Tex Wash"
_INNER = (
    "adj adm adv alex asst assoc atty attys ave brig capt cf cie cmdr col comdr cpl dept det dr drs elec ens ft gen"
    " gov govs hon insp invt jos lieut lt maj messrs mlle mme mr mrs ms msgr mt natl pfc ph pres prof profs pvt rep"
    " reps rev sen sens sfc sgt spc st ste supt supts treas vs wm"
)
_BEFORE_NUMBER = "art ca fig figs no nos op pp prop"
# A letter and a full stop are one token, unless one of these begins a new sentence.
_STARTERS = (
    "A About According Additionally After An As At But Earlier He Her Here However If In It Last Many More Mr. Ms. Now"
    " Once One Other Our She Since So Some Such That The Their Then There These They This We What When While Yet You"
)
_FILES = (
    "bat bmp c cgi cpp dll doc docx exe gif gz h htm html jar java jpeg jpg mov pdf php pl png ppt ps py sql tar txt"
    " wav x xml zip"
)
# Words that are not simple runs of letters: they are split in two, or may keep a full stop.
SPECIAL = frozenset(
    f"{_ENDING} {_ENDING_CAPITAL} {_INNER} {_BEFORE_NUMBER} mfg mtg pte pty ppte ppty ptes ptys pptes pptys"
    " cannot gonna wanna gotta lemme gimme".lower().split()
)

_SPACE = r"[ \t\u00a0\u2000-\u200a\u3000]"
_GAP = r"[ \t\n\u00a0\u2000-\u200a\u3000]"  # or a new line
_APOSTROPHE = r"(?:['\u0092\u2019]|&apos;)"
_STROKE = r"(?:['`\u0091\u0092\u2018\u2019\u201b]|&apos;)"  # any character written as an apostrophe
_HYPHEN = r"[-_\u058a\u2010\u2011]"
_D, _ALNUM = f"[{DIGITS}]", f"[{LETTERS}{DIGITS}]"
_ENTITY = "&[aeiouAEIOU](?i:acute|grave|uml);"
_LETTER = f"(?:[{LETTERS}{MARKS}]|{_ENTITY})"
_INSIDE = f"(?:[{LETTERS}{MARKS}{DIGITS}]|{_ENTITY})"

_WORD = rf"{_LETTER}{_INSIDE}*(?:[.!?]{_LETTER}{_INSIDE}*)*"
_ELIDED = rf"(?:(?i:[dol]){_STROKE}{_ALNUM})?{_ALNUM}+"  # the o' of o'clock
_HYPHENATED = rf"{_ELIDED}(?:{_HYPHEN}{_ELIDED})*"
_CLITIC = rf"{_APOSTROPHE}(?i:[msd]|re|ve|ll)"
_ACRONYM = r"[A-Za-z](?:\.[A-Za-z])+"
_LETTER_CODE = r"[A-Z]+(?:(?:\+|&|&amp;)[A-Z]+)+"
_COMPOUND = rf"[A-Za-z0-9][A-Za-z0-9.,\u00ad]*(?:-(?:{_ACRONYM}\.|[A-Za-z0-9\u00ad]+))+"
_POINT = r"[.:,\u00ad\u066b\u066c]"
_NUMBER = rf"(?:{_D}+(?:{_POINT}{_D}+)*|(?:{_POINT}{_D}+)+)"
_ALTERNATIVE = "[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"  # one side of and/or
_ATTRIBUTE = r"""[A-Za-z][\w:.-]*(?: *= *(?:"[^"\n]*"|'[^'\n]*'))?"""
_TAG = rf"(?a:<(?:[!?][A-Za-z-][^>\n]*|/[A-Za-z][\w:.-]*|[A-Za-z][\w:.-]*(?: +{_ATTRIBUTE})* */?) *>)"
_NO_STOP = "(?<![-.,!?])"  # an address ends before a stop
_PATH = rf'/[^\t\n "()<>|]{{2,}}(?<![{{}}]){_NO_STOP}'
_HOSTS = (
    (r'(?i:www)\.(?:[^\t\n -"(),.<>?{-}]+\.)', "[A-Za-z]{2,4}"),
    (r"""(?:[^\t\n -"$'-),-`{-}]+\.)""", "(?i:com|net|org|edu)"),
)
_MAIL = r'[^\t\n "(){-}<>\u00a0'  # the class is left open: names may contain full stops, parts of a host may not
_DIAL = r"[- \u00a0]"
_FACE = "[-^x=~<>']"


def _unbroken(text: str) -> str:
    return re.sub(_SPACE, "\u00a0", text)


def _escaped(text: str) -> str:
    return _unbroken(text).replace("(", "-LRB-").replace(")", "-RRB-")


def _plain(text: str) -> str:
    """Without soft hyphens; "-" if nothing is left."""
    return text.replace("\u00ad", "").replace("&apos;", "'").replace("&amp;", "&") or "-"


def _contraction(text: str) -> str:
    return re.sub(_APOSTROPHE, "'", re.sub("[\u0091\u2018\u201b]", "`", text))


_QUOTES = {
    **dict.fromkeys("\u0091\u2018\u201b\u2039", "`"),
    **dict.fromkeys("\u0092\u2019\u203a", "'"),
    **dict.fromkeys("\u0093\u201c\u00ab", "``"),
    **dict.fromkeys("\u0094\u201d\u00bb", "''"),
}


def _quotes(text: str) -> str:
    return "".join(_QUOTES.get(mark, mark) for mark in text.replace("&apos;", "'"))


def _form(text: str) -> Callable[[str], str]:
    return lambda _: text


_Table = tuple[tuple[str, str, Callable[[str], str]], ...]

_WORDS: _Table = (
    (f"{_SPACE}+", "", _form("")),
    # Words that are split in two. The second half is matched by itself.
    ("(?i:can)", "(?i:not)", str),
    ("(?i:gon|wan)", "(?i:na)", str),
    ("(?i:got)", "(?i:ta)", str),
    ("(?i:lem|gim)", "(?i:me)", str),
    ("(?i:'t)", "(?i:is|was)", str),
    (_TAG, "", _unbroken),
    (r"(?i:&(?:md|mdash|ndash);)|[\u0096\u0097\u2013-\u2015]", "", _form("--")),
    ("(?i:&nbsp;)", "", _form("")),
    ("(?i:&amp;)", "", _form("&")),
    ("(?i:&(?:ht|tl|ur|lr|qc|ql|qr|odq|cdq|#[0-9]+);)", "", str),
    (_WORD, _CLITIC, _plain),
    (r"[A-Za-z\u00ad]*?[A-MO-Za-mo-z]\u00ad*", rf"(?i:n{_STROKE}t)", _plain),
    (_WORD, "", _plain),
    # Apostrophes that are part of a word.
    (rf"[A-HJ-XZn]{_STROKE}[{LETTERS}]{{2,}}", "", str),
    (rf"[{LETTERS}]+[aeiouyAEIOUY]{_STROKE}[aeiouA-Z][{LETTERS}]*|(?i:o{_STROKE}o)", "", str),
    (rf"{_APOSTROPHE}(?i:n{_APOSTROPHE}?|em|till?|cause|[2-9]0s)", "", str),
    (rf"(?i:dunkin|somethin|ol|[ldj]){_APOSTROPHE}", "", str),
    (r"(?i:c'mon|e['\u0092\u2019]er|c['\u0092\u2019]est|s'mores)", "", str),
    (rf"{_APOSTROPHE}[0-9][0-9]", _GAP, str),
    (rf"(?i:y){_APOSTROPHE}", f"[{LETTERS}]", str),
)
_ADDRESSES: _Table = (
    (rf'(?i:https?)://[^\t\n "(){{-}}<>]{{2,}}{_NO_STOP}', "", str),
    # Without a path, a host name is as long as possible; before a path it ends at the first slash.
    *((rf"{start}+{end}", "", str) for start, end in _HOSTS),
    *((rf"{start}+?{end}{_PATH}", "", str) for start, end in _HOSTS),
    (rf"(?:<|&lt;)?[A-Za-z0-9]{_MAIL}]*@{_MAIL}.]+(?:\.{_MAIL}.]+)*(?:>|&gt;)?", "", str),
    (rf"@[A-Za-z_][A-Za-z0-9_]*|#{_LETTER}+", "", str),
    (_CLITIC, "[^A-Za-z]", _contraction),
    ("'", r"[A-Za-z][^ \t\n\u00a0]", _form("`")),
    (_CLITIC, "", _contraction),
    (rf"(?i:n{_STROKE}t)", "", _contraction),
)
_NUMBERS: _Table = (
    (rf"{_D}{{1,2}}[-/]{_D}{{1,2}}[-/]{_D}{{2,4}}", "", str),
    (rf"[-+]?{_NUMBER}", "", _plain),
    (r"[\u207a\u207b\u208a\u208b]?(?:[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+|[\u2080-\u2089]+)", "", str),
    (rf"(?:{_D}{{1,4}}{_DIAL})?{_D}{{1,4}}(?:\\?/|\u2044){_D}{{1,4}}", "", _unbroken),
    *((mark, "", _form(f"{up}/{down}")) for mark, up, down in ("¼14", "½12", "¾34", "⅓13", "⅔23")),
    (r"(?i:-(?:rrb|lrb|rcb|lcb|rsb|lsb)-)", "", str),
    ("(?i:s&p-500|s&ls)", "", str),
    (rf"{_ALTERNATIVE}(?:\\?/{_ALTERNATIVE}){{1,2}}", "", str),
    (r"[A-Z]*\$|#", "", str),
    ("[\u0080\u00a4\u20a0\u20ac]", "", _form("$")),
    ("\u00a2", "", _form("cents")),
    ("\u00a3", "", _form("#")),
)
_ABBREVIATIONS: _Table = (
    (
        rf"(?:{_any(_ENDING)}|(?=[A-Z]){_any(_ENDING_CAPITAL)}|(?i:ed|ph)\.(?i:d)|(?i:p)[Pp]?(?i:t)[ye]s?)\.",
        r"(?s:.{0,2})",
        str,
    ),
    (rf"{_any(_BEFORE_NUMBER)}\.", f"{_GAP}?{_D}", str),
    ("[A-Za-z]", rf"\.{_GAP}+(?:(?=[A-Z]){_any(_STARTERS)}|{_TAG}){_GAP}", str),
    (rf"(?:{_ACRONYM}|[A-Za-z]|(?i:m)[ft](?i:g)|{_any(_INNER)})\.", "", str),
    # Telephone numbers, with their spaces.
    (
        rf"(?:\([0-9]{{2,3}}\)[ \u00a0]?|\+{{0,2}}(?:[0-9]{{2,4}}{_DIAL}){{1,2}})[0-9]{{3,4}}{_DIAL}?[0-9]{{3,5}}",
        "",
        _escaped,
    ),
    (r"(?:\+{0,2}[0-9]{2,4}\.)?[0-9]{2,4}\.[0-9]{3,4}\.[0-9]{3,5}", "", str),
    (rf"{_INSIDE}+(?:\.{_INSIDE}+)*\.{_any(_FILES)}", rf"[!,.?]|{_GAP}", str),
)
_SIGNS: _Table = (
    ('"|&quot;', "", _form("''")),
    ("<|&lt;", "", _form("<")),
    (">|&gt;", "", _form(">")),
    # Faces such as ;-) and (^_^).
    (r"[<>]?[:;=]['*o-]?[][()@DOPdp\\{|]", "[^A-Za-z0-9]", _escaped),
    (rf"{_FACE}_{_FACE}|\({_FACE}[_.]?{_FACE}\)|\((?!-){_FACE}-(?:`|(?!-){_FACE})\)", "", _escaped),
    *((sign, "", _form(f"-{name}RB-")) for sign, name in ((r"\(", "L"), (r"\)", "R"))),
    *((sign, "", _form(f"-{name}SB-")) for sign, name in ((r"\[", "L"), (r"\]", "R"))),
    *((sign, "", _form(f"-{name}CB-")) for sign, name in ((r"\{", "L"), (r"\}", "R"))),
    ("-{2,4}(?!-)", "", _form("--")),
    ("-+", "", str),
    (r"\.{3,5}|(?:\.[ \u00a0]){2,4}\.|\u2026", "", _form("...")),
    (r"@+|#+|_+|\*+|(?:\\\*){1,3}|[?!]+", "", str),
    (_HYPHENATED, "", str),
    (_LETTER_CODE, "", _plain),
    (_COMPOUND, "", _plain),
    (rf"(?:{_WORD}|{_HYPHENATED}|{_LETTER_CODE}|{_COMPOUND})\.", "[,;:]", _plain),
    (r"(?i:c)\+\+|(?i:c|f)#", "", str),
    (r"''|'|&apos;|[`\u0091-\u0094\u2018\u2019\u201a-\u201f\u2039\u203a\u00ab\u00bb]{1,2}", "", _quotes),
    ("<<|>>", "", str),
    (f"[{SYMBOLS}]", "", str),
)


@cache
def rules() -> tuple[Rule, ...]:
    """All rules, in order of precedence. Compiled once."""
    table = (*_WORDS, *_ADDRESSES, *_NUMBERS, *_ABBREVIATIONS, *_SIGNS)
    return tuple(Rule(re.compile(f"({token})(?:{context})"), emit) for token, context, emit in table)
