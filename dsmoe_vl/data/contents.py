"""What a sample gives to the tasks: its texts, its image or video, its recording; and what cannot be used, and why.

Training, evaluation, the tokenizer and `data_tools` read samples through `contents_of` only, so they always agree.
"""

from __future__ import annotations

import unicodedata
import weakref
from dataclasses import dataclass
from typing import Any

from dsmoe_vl.config.task_table import TASKS, TaskSpec
from dsmoe_vl.data.sample import MEDIA_EXTENSIONS, SPEECH_EXTENSIONS, Sample, split_name
from dsmoe_vl.data.shards.habits import named
from dsmoe_vl.errors import DataError

_PLACES = ("captions", "caption")  # of captions in KEY.json, by priority; KEY.txt is the last
_UNSEEN = ("Cc", "Cf", "Zs", "Zl", "Zp")  # Unicode's categories of control and format characters and of white space


@dataclass(frozen=True)
class Contents:
    """The usable contents of a sample.

    `captions`, `summary`, `transcript`: as `text_of` makes them, never blank; () and "" for none. A transcript has the
    words of the recording; without `transcript` in KEY.json they are those of the only caption.
    `tasks`: names of the tasks that may use the sample and can.
    `no_task`: why `tasks` of KEY.json leaves none, "" if it does not.
    `no_media`, `no_recording`, `no_caption`, `no_summary`, `no_transcript`: the reason, "" if the sample has one.
    `flaws`: entries that are left out of a sample that is usable without them.
    Reasons and flaws are texts of the form `kind: detail`.
    """

    captions: tuple[str, ...]
    summary: str
    transcript: str
    tasks: tuple[str, ...]
    no_task: str
    no_media: str
    no_recording: str
    no_caption: str
    no_summary: str
    no_transcript: str
    flaws: tuple[str, ...]

    @property
    def texts(self) -> tuple[str, ...]:
        """The captions, then the summary and the transcript, each once."""
        return tuple(dict.fromkeys(filter(None, (*self.captions, self.summary, self.transcript))))

    @property
    def problems(self) -> tuple[str, ...]:
        """Everything that cannot be used. A missing text counts if no task can use the sample without it."""
        has_use = self.tasks or self.summary
        no_media = self.no_media if self.no_recording else ""
        no_words = "" if self.no_recording else self.no_transcript
        no_text = "" if has_use else self.no_caption or no_words
        return tuple(filter(None, (no_media, no_text, self.no_task, *self.flaws)))


def contents_of(sample: Sample) -> Contents:
    """What a sample gives: `captions` of KEY.json, else `caption`, else KEY.txt; and `summary` of KEY.json.

    Both places of captions may have a list of texts or one text. Of a sample that was read without its media only
    `tasks` may differ. Those of the last sample are kept, because every task asks for them.
    """
    global _last
    if _last is not None and _last[0]() is sample:
        return _last[1]
    contents = _contents(sample)
    _last = weakref.ref(sample), contents
    return contents


_last: tuple[weakref.ref[Sample], Contents] | None = None  # one name, so that threads see both or neither


def _contents(sample: Sample) -> Contents:
    captions, no_text = _captions(sample)
    no_caption = "" if captions else f"no caption: {'; '.join(no_text) or _no_place(sample)}{_files(sample)}"
    summary, no_summary = _summary(sample)
    flaws = [f"entries without text: {one}" for one in no_text if captions]
    if sample.meta.get("summary") is not None and not summary:
        flaws.append(no_summary)
    no_media, several = _missing(sample, sample.media, "image or video", MEDIA_EXTENSIONS)
    no_recording, several_recordings = _missing(sample, sample.recording, "recording", SPEECH_EXTENSIONS)
    has = (*(() if no_media else ("video" if sample.is_video else "image",)), *(() if no_recording else ("speech",)))
    transcript, no_transcript = _transcript(sample, captions)
    tasks, unknown = _tasks(sample, has, captions, summary, transcript)
    flaws += [unknown] if unknown and tasks else []
    return Contents(
        captions,
        summary,
        "" if no_recording else transcript,
        tasks,
        "" if tasks else unknown,
        no_media,
        no_recording,
        no_caption,
        no_summary,
        no_recording or no_transcript,
        (*flaws, *several, *several_recordings),
    )


def media_of(sample: Sample) -> bytes:
    """The encoded image or video. Raises DataError without one."""
    if sample.media is None:
        raise DataError(contents_of(sample).no_media)
    return sample.media


def recording_of(sample: Sample) -> bytes:
    """The encoded recording. Raises DataError without one."""
    if sample.recording is None:
        raise DataError(contents_of(sample).no_recording)
    return sample.recording


def offered_tasks(sample: Sample) -> tuple[str, ...] | None:
    """The known names in `tasks` of KEY.json, a list of names or one name; None without `tasks`: every task may use the
    sample."""
    value = sample.meta.get("tasks")
    return None if value is None else tuple(spec.name for spec in TASKS if spec.name in _entries(value))


def text_of(value: Any) -> str:
    """A value as a text, without byte-order marks, and without white space around it; "" if it is none, or if nothing
    of it could be seen."""
    if not isinstance(value, str):
        return ""
    text = value.replace("\ufeff", "").strip()
    return text if any(unicodedata.category(character) not in _UNSEEN for character in text) else ""


def is_offered(sample: Sample, task: str) -> bool:
    """Whether the `tasks` of the sample's source and those of its KEY.json have the task. A missing list means all, and
    so does an empty one of the source."""
    wanted, offered = sample.source.tasks, offered_tasks(sample)
    return (not wanted or task in wanted) and (offered is None or task in offered)


def why_unused(sample: Sample, task: TaskSpec) -> str:
    """Why a task does not use the sample, as `kind: detail`; "" if it does.

    Raises DataError if a list asks for the task and the sample lacks what the task needs: as in training, it is bad.
    """
    if not is_offered(sample, task.name):
        return "for other tasks: `tasks` of its KEY.json or of its source does not have this one"
    contents = contents_of(sample)
    if task.name in contents.tasks:
        return ""
    lacks = (getattr(contents, f"no_{need}") for need in task.needs)
    reason = next(filter(None, lacks), f"not usable: it does not have what {task.name} needs")
    if sample.source.tasks or offered_tasks(sample) is not None:
        raise DataError(reason)
    return reason


def _missing(
    sample: Sample, found: bytes | None, what: str, extensions: tuple[str, ...]
) -> tuple[str, tuple[str, ...]]:
    """The reason why a sample has no file of a kind, "" if it has one, and a flaw if it has several. Its names
    count: it may have been read without its media."""
    names = [name for name in sample.names if split_name(name)[1] in extensions]
    if len(names) > 1:
        return "", (several(what, names),)
    if found is not None or names:
        return "", ()
    looked_for = f": none of {', '.join(f'KEY.{extension}' for extension in extensions)}{_files(sample)}"
    return f"no {what}{looked_for if sample.names else ''}", ()


def several(what: str, names: list[str]) -> str:
    """The flaw of a sample with several files of one kind, such as "image or video"."""
    return f"several {what.replace(' or ', 's or ')}s: {named(names)}; only {names[0]} is used"


def _no_place(sample: Sample) -> str:
    """That no place has a caption, and what KEY.json has instead."""
    others = [name for name in sample.meta if name not in _PLACES]
    instead = f" (it has {named(others)})" if others else ""
    return f"no text in `captions` or `caption` of KEY.json{instead}, nor in KEY.txt"


def _files(sample: Sample) -> str:
    """The end of a reason: the files that the sample has, and why one that is expected may be none of them."""
    found = f"; {sample.key} has the files {named(sample.names)}" if sample.names else ""
    return f"{found}; {sample.habit}" if sample.habit else found


def _captions(sample: Sample) -> tuple[tuple[str, ...], list[str]]:
    """The captions, and a description of the entries of KEY.json that were looked at and have no text."""
    no_text = []
    for place in _PLACES:
        entries = _entries(sample.meta.get(place))
        texts = tuple(text for entry in entries if (text := text_of(entry)))
        if others := [entry for entry in entries if not text_of(entry)]:
            count = f"{len(others)} of {len(entries)} entries of `{place}`"
            no_text.append(f"{count} in KEY.json have no text, such as {_shown(others[0])}")
        if texts:
            return texts, no_text
    text = text_of(sample.text)
    return ((text,) if text else ()), no_text


def _summary(sample: Sample) -> tuple[str, str]:
    """The summary, and the reason if there is none."""
    value = sample.meta.get("summary")
    if text := text_of(value):
        return text, ""
    detail = "no `summary` in KEY.json" if value is None else f"`summary` in KEY.json is {_shown(value)}"
    return "", f"no summary: {detail}"


def _transcript(sample: Sample, captions: tuple[str, ...]) -> tuple[str, str]:
    """The words of a recording, and the reason if they are not known."""
    value = sample.meta.get("transcript")
    if text := text_of(value):
        return text, ""
    if len(captions) == 1:
        return captions[0], ""
    detail = "no `transcript` in KEY.json" if value is None else f"`transcript` in KEY.json is {_shown(value)}"
    return "", f"no transcript: {detail}, and {len(captions)} captions, not one"


def _tasks(
    sample: Sample, has: tuple[str, ...], captions: tuple[str, ...], summary: str, transcript: str
) -> tuple[tuple[str, ...], str]:
    """The tasks that may use the sample and can, and what is wrong with `tasks` of KEY.json."""
    meta = {**sample.meta, "summary": summary, "transcript": transcript}
    able = tuple(spec.name for spec in TASKS if spec.qualifies(has, captions, meta))
    offered, names = offered_tasks(sample), [spec.name for spec in TASKS]
    if offered is None:
        return able, ""
    found, entries = tuple(name for name in able if name in offered), _entries(sample.meta["tasks"])
    if unknown := [entry for entry in entries if entry not in names]:
        return found, f"unknown task: {_shown(unknown[0])} in `tasks` of KEY.json; the tasks are {', '.join(names)}"
    if able and not found:
        only = ", ".join(offered) or "no task"
        return found, f"no task: `tasks` of KEY.json names {only}, and the sample can be used for {', '.join(able)}"
    return found, ""


def _entries(value: Any) -> list[Any]:
    """Where KEY.json may have a list or one value: a list."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _shown(value: Any) -> str:
    return "null" if value is None else f"{value!r:.40}"
