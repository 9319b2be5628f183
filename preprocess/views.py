"""Views, their modifiers and sides of mammograms: DICOM's codes, and one spelling for what files and tables write.

Views are written as the acronyms of ACR's MQCM 1999, which DICOM gives next to its codes (PS3.16 CID 4014 and CID 4015).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

# PS3.16 CID 4014: acronym, codes in SCT and in SRT (also written under SNM3), words.
_VIEWS = (
    ("ML", "399260004", "R-10224", "medio-lateral", "medial-lateral"),
    ("MLO", "399368009", "R-10226", "medio-lateral oblique"),
    ("LM", "399352003", "R-10228", "latero-medial"),
    ("LMO", "399099002", "R-10230", "latero-medial oblique"),
    ("CC", "399162004", "R-10242", "cranio-caudal"),
    ("FB", "399196006", "R-10244", "caudo-cranial", "caudo-cranial (from below)", "from below"),
    ("SIO", "399188001", "R-102D0", "superolateral to inferomedial oblique"),
    ("ISO", "441555000", "R-40AAA", "inferomedial to superolateral oblique"),
    ("XCCL", "399192008", "R-1024A", "cranio-caudal exaggerated laterally", "exaggerated cranio-caudal lateral", "Y-X1770"),
    ("XCCM", "399101009", "R-1024B", "cranio-caudal exaggerated medially", "exaggerated cranio-caudal medial", "Y-X1771"),
    ("XCC", "", "", "exaggerated cranio-caudal", "cranio-caudal exaggerated"),  # in no code, but in tables
    ("SPECIMEN", "127457009", "G-8310", "tissue specimen from breast", "specimen"),
)
# PS3.16 CID 4015: our name, ACR's acronym, codes in SCT and in SRT, words. An acronym before a view ends in "-", one after it
# begins so, one without takes the view's place.
_MODIFIERS = (
    ("cleavage", "CV", "399161006", "R-102D2"),
    ("axillary_tail", "AT", "399011000", "R-102D1"),
    ("rolled_lateral", "-RL", "399197002", "R-102D3"),
    ("rolled_medial", "-RM", "399226006", "R-102D4"),
    ("rolled_inferior", "-RI", "414493004", "R-102CA"),
    ("rolled_superior", "-RS", "415670009", "R-102C9"),
    ("implant_displaced", "-ID", "399209000", "R-102D5", "Eklund"),
    ("magnification", "M-", "399163009", "R-102D6", "magnified", "mag"),
    ("spot", "S-", "399055006", "R-102D7", "spot compression", "spot compressed"),
    ("tangential", "TAN", "399110001", "R-102C2"),
    ("nipple_in_profile", "-NP", "442581004", "R-40AB3"),
    ("anterior_compression", "-AC", "441752004", "P2-00161"),
    ("inframammary_fold", "-IMF", "442593008", "R-40ABE", "infra-mammary fold"),
    ("axillary_tissue", "-AX", "442580003", "R-40AB2"),
)
MODIFIERS = tuple(name for name, *_ in _MODIFIERS)
_REPLACING = {name: acronym for name, acronym, *_ in _MODIFIERS if "-" not in acronym}
VIEWS = (*(acronym for acronym, *_ in _VIEWS), *_REPLACING.values())
SIDES = {"L": "L", "LEFT": "L", "LT": "L", "R": "R", "RIGHT": "R", "RT": "R"}


class View(NamedTuple):
    """A view as it is written here.

    Attributes
    ----------
    name
        An acronym of `VIEWS`; in capitals, what was written, where that is no known view; empty where nothing was.
    modifiers
        Names of `MODIFIERS`.
    side
        ``L`` or ``R`` where the words name a side too, as ``RMLO`` does.
    """

    name: str = ""
    modifiers: tuple[str, ...] = ()
    side: str = ""


def _plain(text: str) -> str:
    return re.sub(r"[^A-Z0-9]+", "", text.upper())


_CODES = {
    **{code: View(acronym) for acronym, *codes in _VIEWS for code in codes if code},
    **{code: View(_REPLACING.get(name, ""), (name,)) for name, _, *codes in _MODIFIERS for code in codes},
}
_WORDS = {
    **{_plain(word): view for word, view in _CODES.items()},
    **{_plain(name): View(_REPLACING.get(name, ""), (name,)) for name in MODIFIERS},
    **{acronym: View(acronym) for acronym, *_ in _VIEWS},
    **{acronym: View(acronym, (name,)) for name, acronym in _REPLACING.items()},
}
_BEFORE = {acronym[:-1]: name for name, acronym, *_ in _MODIFIERS if acronym.endswith("-")}
_AFTER = {acronym[1:]: name for name, acronym, *_ in _MODIFIERS if acronym.startswith("-")}
# "LMLO", "MCC", "RMCCID": what is written in one word. A whole acronym, such as ML or LMO, is tried before.
_COMPOUND = re.compile(
    rf"(?P<side>[LR]?)(?P<before>(?:{'|'.join(_BEFORE)})*)"
    rf"(?P<view>XCCL|XCCM|XCC|MLO|LMO|ML|LM|CC|FB|SIO|ISO)(?P<after>(?:{'|'.join(sorted(_AFTER, key=len, reverse=True))})*)"
)


def normal_side(text: object) -> str:
    """Return ``L`` or ``R`` for a side in any case (``left``, ``Rt``), "" for everything else."""
    words = str(text).upper().replace("BREAST", "").strip(" .")
    return SIDES.get(words, "")


@cache
def normal_view(text: str) -> View:
    """Return a view, written as an acronym or in words, with or without modifiers and side, as one spelling.

    Examples
    --------
    >>> normal_view("mlo"), normal_view("R_MCC")[:2], normal_view("Medio-Lateral Oblique").name
    (View(name='MLO', modifiers=(), side=''), ('CC', ('magnification',)), 'MLO')
    >>> normal_view("stereo").name
    'STEREO'
    """
    whole = _WORDS.get(_plain(text))
    if whole is not None:
        return whole
    compound = _COMPOUND.fullmatch(_plain(text))
    if compound:
        before, after = re.findall("|".join(_BEFORE), compound["before"]), compound["after"]
        suffixes = re.findall("|".join(sorted(_AFTER, key=len, reverse=True)), after)
        modifiers = (*(_BEFORE[b] for b in before), *(_AFTER[a] for a in suffixes))
        return View(compound["view"], _sorted(modifiers), compound["side"])
    found, side = [], ""
    for word in re.split(r"[\s,;/_+-]+", text.strip()):
        part = _WORDS.get(_plain(word)) or (View(side=normal_side(word)) if normal_side(word) else None)
        compound = None if part else _COMPOUND.fullmatch(_plain(word))
        if part is None and compound is None:
            return View(" ".join(text.upper().split()))
        found.append(part or normal_view(word))
        side = side or found[-1].side
    names = {view.name for view in found if view.name}
    if len(names) > 1 or not found:
        return View(" ".join(text.upper().split()))
    return View("".join(names), _sorted(m for view in found for m in view.modifiers), side)


def coded_view(code: str, meaning: str, modifiers: list[tuple[str, str]]) -> View:
    """Return the view of a ViewCodeSequence.

    Parameters
    ----------
    code, meaning
        CodeValue and CodeMeaning. A code counts under any designator (SCT, SRT, SNM3, 99SDM): none has two meanings. An
        unknown code is told by its meaning.
    modifiers
        The same of each item of ViewModifierCodeSequence. A cleavage, axillary tail or tangential view takes the name of its
        modifier, as in CID 4015.
    """
    view = _CODES.get(code) or normal_view(meaning)
    found = [*view.modifiers]
    name = view.name
    for modifier, words in modifiers:
        known = _CODES.get(modifier) or normal_view(words)
        found += known.modifiers
        name = known.name if known.modifiers and known.name else name
    return View(name, _sorted(found))


def _sorted(modifiers: Iterable[str]) -> tuple[str, ...]:
    found = set(modifiers)
    return tuple(name for name in MODIFIERS if name in found)
