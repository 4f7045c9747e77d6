"""Questions and their answers: every answer is a file, so a run that was interrupted goes on where it stopped.

A study asks questions, plain dictionaries, which worker processes answer; what is asked may not depend on an answer.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tvbases_hf.storage.output import write_json

from .workshop import Workshop

Question = Mapping[str, Any]
Answer = dict[str, Any]


def _always(workshop: Any, question: Question) -> bool:
    return True


@dataclass(frozen=True)
class Study:
    """``version`` goes up when a question gets another answer; ``holds`` says if a stored answer still counts."""

    name: str
    questions: Callable[[Any], Iterable[Question]]
    answer: Callable[[Any, Question], Answer]
    version: int = 1
    holds: Callable[[Any, Question], bool] = _always


@dataclass(frozen=True)
class Answers:
    """The answers of one study, in the order of its questions."""

    found: list[tuple[Question, Answer]]

    def of(self, **wanted: Any) -> list[Answer]:
        """Those to the questions that agree with all that is wanted."""
        return [a for q, a in self.found if all(q.get(key) == value for key, value in wanted.items())]

    def one(self, **wanted: Any) -> Answer:
        found = self.of(**wanted)
        if len(found) != 1:
            raise LookupError(f"{len(found)} answers to {wanted}")
        return found[0]

    def __iter__(self) -> Iterator[tuple[Question, Answer]]:
        return iter(self.found)


def answer_file(workshop: Workshop, study: Study, question: Question) -> Path:
    text = json.dumps([study.version, workshop.key, dict(question)], sort_keys=True)
    words = "-".join(str(value) for value in question.values()).replace("/", "_").replace(" ", "_")
    digest = hashlib.sha256(text.encode()).hexdigest()[:10]
    return workshop.workdir / "answers" / study.name / f"{words[:80]}-{digest}.json"


def run(studies: Sequence[Study], workshop: Workshop, processes: int, *, quiet: bool = False) -> dict[str, Answers]:
    """Answer what is not answered yet, study after study, and return all answers by study."""
    asked = {study.name: list(study.questions(workshop.settings)) for study in studies}
    open_questions = [
        (study, question)
        for study in studies
        for question in asked[study.name]
        if not _known(workshop, study, question)
    ]
    total = sum(len(questions) for questions in asked.values())
    with tqdm(total=total, initial=total - len(open_questions), disable=True if quiet else None) as bar:
        for study, question in _answered(open_questions, workshop, processes):
            bar.set_description(f"{study.name} {' '.join(str(value) for value in question.values())}"[:60])
            bar.update()
    return {
        study.name: Answers([(q, _read(answer_file(workshop, study, q))) for q in asked[study.name]])
        for study in studies
    }


def known(workshop: Workshop, study: Study) -> Answers:
    """What is answered of a study's questions so far, whether or not it would be asked again."""
    asked = [q for q in study.questions(workshop.settings) if answer_file(workshop, study, q).is_file()]
    return Answers([(q, _read(answer_file(workshop, study, q))) for q in asked])


def _known(workshop: Workshop, study: Study, question: Question) -> bool:
    return answer_file(workshop, study, question).is_file() and study.holds(workshop, question)


def _answered(
    asked: Sequence[tuple[Study, Question]], workshop: Workshop, processes: int
) -> Iterator[tuple[Study, Question]]:
    if processes <= 1 or len(asked) <= 1:
        for study, question in asked:
            _answer(workshop, study, question)
            yield study, question
        return
    start = multiprocessing.get_context("spawn")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a worker's libraries read it when they start
    with ProcessPoolExecutor(processes, mp_context=start, initializer=_open, initargs=(workshop,)) as pool:
        pending = {pool.submit(_answer_in_worker, study, question): (study, question) for study, question in asked}
        try:
            for future in as_completed(pending):
                future.result()
                yield pending[future]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_workshop: Workshop | None = None


def _open(workshop: Workshop) -> None:
    global _workshop
    torch.set_num_threads(1)  # one process per core: the matrices are small
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _workshop = workshop


def _end_with_parent() -> None:
    """A killed run leaves no worker behind; what one was at is asked again."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _answer_in_worker(study: Study, question: Question) -> None:
    assert _workshop is not None
    _answer(_workshop, study, question)


def _answer(workshop: Workshop, study: Study, question: Question) -> None:
    file = answer_file(workshop, study, question)
    file.parent.mkdir(parents=True, exist_ok=True)
    began, busy = time.perf_counter(), time.process_time()
    answer = study.answer(workshop, question)
    answer |= {"seconds": time.perf_counter() - began, "processor_seconds": time.process_time() - busy}
    part = file.with_suffix(f".{os.getpid()}")
    write_json(part, {"question": dict(question), "answer": answer})
    part.replace(file)


def _read(file: Path) -> Answer:
    return json.loads(file.read_text(encoding="utf-8"))["answer"]
