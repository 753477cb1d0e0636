"""Question answering: LAVIS's task, on any device, with results for the official evaluators."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lavis.common.dist_utils import (
    get_rank,
    get_world_size,
    is_dist_avail_and_initialized,
    is_main_process,
    main_process,
)
from lavis.common.registry import registry
from lavis.datasets.datasets.vqa_datasets import VQADataset
from lavis.models.blip_models.blip_vqa import BlipVQA
from lavis.tasks.vqa import VQATask
from torch.utils.data import Dataset

from lavis_aurora.common.answers import (
    ANNOTATORS,
    EXAMPLES,
    Generated,
    Truth,
    Unreachable,
    as_generated,
    generated_truths,
    unreachable_answers,
    vqa_score,
)
from lavis_aurora.common.errors import AuroraError, shown
from lavis_aurora.common.files import read_json, write_text
from lavis_aurora.data.report import DataReport, Finding
from lavis_aurora.evaluation.answers import exact_match, vqa_accuracy
from lavis_aurora.training.tasks.base import AuroraTaskBase, LavisTaskMixin, evaluated_keys, extremes

SHOWN_TYPES = 12  # question types that a report lists; VQAv2 has 65


@registry.register_task("vqa_aurora")
class VqaAuroraTask(LavisTaskMixin, VQATask, AuroraTaskBase):
    """LAVIS's vqa: the likeliest answer of a list, or a generated one, and VQAv2's accuracy by answer type."""

    # What a result is known by, when processes have answered a question twice.
    result_key = "question_id"
    generated: Generated | None = None
    scores: Sequence[float] | None = ()

    def build_datasets(self, cfg: Any) -> dict[str, dict[str, Any]]:
        """Datasets by name and split, their files checked, with what the evaluation of each split needs.

        Raises:
            AuroraError: a split to evaluate has no list to rank, or one to select the best epoch by no true answers.
        """
        datasets = super().build_datasets(cfg)
        for name, splits in datasets.items():
            for split, dataset in splits.items():
                for key in evaluated_keys(cfg.run_cfg):
                    if split in (cfg.run_cfg.get(key) or []):
                        self._check_split(f"datasets.{name}.build_info.annotations.{split}.storage", key, dataset)
        return datasets

    def _check_split(self, files: str, key: str, dataset: Dataset[Any]) -> None:
        if isinstance(getattr(dataset, "inner", dataset), VQADataset):
            raise AuroraError(f"run.{key}: {files} holds questions to train on; evaluate another split")
        self._check_answers(files, dataset)
        if key == "valid_splits" and not getattr(dataset, "coco_fmt_anno_file", None):
            raise AuroraError(
                f"{files}: run.valid_splits needs true answers to select the best epoch by, VQAv2's questions and "
                f"annotations as the third and fourth file; name them, or validate on another split"
            )

    def _check_answers(self, files: str, dataset: Dataset[Any]) -> None:
        """Refuse to rank answers without a list of them."""
        if self.inference_method == "rank" and not getattr(dataset, "answer_list", None):
            raise AuroraError(
                f"{files}: run.inference_method rank needs a list of answers, the second file; name it, or set "
                f"run.inference_method: generate"
            )

    def complete_report(self, report: DataReport, datasets: dict[str, dict[str, Any]]) -> None:
        """Say how many questions no answer that can be given is right for, and how many have few annotators."""
        for split in report.splits:
            dataset = datasets[split.dataset][split.split]
            truths = [] if split.train else self._truths(dataset)
            if not truths:
                continue
            few = sum(not isinstance(truth, str) and len(truth) < ANNOTATORS for truth in truths)
            split.counts["few_annotators"] = few
            # Of no split: an evaluation prints both by itself.
            if few:
                text = f"{split.name}: fewer than {ANNOTATORS} annotators answered {few} of {len(truths)} questions"
                report.findings.append(Finding("note", "", text))
            answers = getattr(dataset, "answer_list", None)
            remedy = "add them to the list, or set run.inference_method=generate"
            if self.inference_method == "generate":
                answers, remedy = None, "raise run.max_len where they are longer, or set run.inference_method=rank"
                if report.tokens is not None:
                    truths, answers = generated_truths(truths, self._generated_by(report.tokens.tokenizer))
            if answers is None:
                continue
            found = unreachable_answers(truths, answers)
            split.counts["unreachable_answers"] = found.unreachable
            if found.unreachable:
                report.findings.append(Finding("warning", "", f"{split.name}: {found}; {remedy}"))

    def _generated_by(self, tokenizer: Any) -> Generated:
        """How a model of this tokenizer decodes what it generates."""
        return partial(as_generated, tokenizer=tokenizer, min_len=self.min_len, max_len=self.max_len)

    @staticmethod
    def _truths(dataset: Any) -> list[Truth]:
        """The true answers of each question; none where they are not known."""
        official = getattr(dataset, "coco_fmt_anno_file", None)
        if official:
            annotations = read_json(official)["annotations"]
            return [[one["answer"] for one in entry["answers"]] for entry in annotations]
        entries = getattr(dataset, "annotation", None) or []
        return [entry["answer"] for entry in entries if isinstance(entry.get("answer"), str)]

    def evaluation(self, model: Any, data_loader: Any, **_kwargs: Any) -> list[dict[str, Any]]:
        """Answers of this process to its share of the questions."""
        self._evaluated, self._judged = data_loader.dataset, list
        self.answer_list = getattr(data_loader.dataset, "answer_list", None)
        self.generated = self._as_generated(model)
        answers: list[dict[str, Any]] = super().evaluation(model, data_loader)
        return answers

    def _as_generated(self, model: Any) -> Generated | None:
        """How the model decodes what it generates; None where it ranks, or is none of BLIP's."""
        inner = getattr(model, "base", model)  # of mode_approx
        if self.inference_method != "generate" or not isinstance(inner, BlipVQA):
            return None
        return self._generated_by(inner.tokenizer)

    def _possible(self) -> dict[str, Any]:
        """Which answers there are to choose from, as :func:`vqa_accuracy` and :func:`exact_match` ask for it."""
        ranked = self.answer_list if self.inference_method == "rank" else None
        return {"answer_list": ranked, "generated": self.generated}

    def valid_step(self, model: Any, samples: dict[str, Any]) -> list[dict[str, Any]]:
        """``question_id``, ``answer`` and, if the model has it, ``confidence`` of each question.

        Ids are numbers or strings.
        """
        found = model.predict_answers(
            samples=samples,
            answer_list=self.answer_list,
            inference_method=self.inference_method,
            num_beams=self.num_beams,
            max_len=self.max_len,
            min_len=self.min_len,
            num_ans_candidates=self.num_ans_candidates,
            prompt=self.prompt,
            return_scores=True,
        )
        ids = samples["question_id"]
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        # LAVIS's models give the answers alone.
        answers, scores = found if isinstance(found, tuple) else (found, None)
        given = [{"question_id": i, "answer": answer} for i, answer in zip(ids, answers)]
        if scores is None:
            return given
        return [{**one, "confidence": float(f"{score:.4g}")} for one, score in zip(given, scores)]

    def after_evaluation(
        self, val_result: list[dict[str, Any]], split_name: str, epoch: int | str, **_kwargs: Any
    ) -> dict[str, Any] | None:
        """Write ``result/SPLIT_epoch_N_vqa_result.json``, which VQAv2's evaluator reads, and score it."""
        path = self.save_result(
            val_result,
            result_dir=registry.get_path("result_dir"),
            filename=f"{split_name}_epoch_{epoch}_vqa_result",
            remove_duplicate=self.result_key,
        )
        metrics: dict[str, Any] | None = self._report_metrics(result_file=path, split=split_name)
        self.print_findings(split_name)
        return metrics

    @staticmethod
    def save_result(result: list[dict[str, Any]], result_dir: str, filename: str, remove_duplicate: str = "") -> str:
        """Join the results of all processes in one file; arguments and value are LAVIS's.

        LAVIS's time grows with the square of the number of results, and its parts stay behind.
        """
        folder = Path(result_dir)
        path = folder / f"{filename}.json"
        write_text(folder / f"{filename}_rank{get_rank()}.json", json.dumps(result))
        if is_dist_avail_and_initialized():
            dist.barrier()
        if is_main_process():
            parts = [folder / f"{filename}_rank{rank}.json" for rank in range(get_world_size())]
            merged = [entry for part in parts for entry in read_json(part)]
            if remove_duplicate:
                # Samplers repeat some samples, to give all processes equally many.
                first: dict[Any, dict[str, Any]] = {}
                for entry in merged:
                    first.setdefault(entry[remove_duplicate], entry)
                merged = list(first.values())
            write_text(path, json.dumps(merged))
            for part in parts:
                part.unlink()
        return str(path)

    def cases(self) -> list[tuple[str, str]]:
        """Questions that are answered worst and best, where their true answers are known."""
        dataset, judged = self._evaluated, self._judged()
        places = {str(entry.get(self.result_key)): i for i, entry in enumerate(dataset.annotation)}
        found = []
        for i in extremes(self.scores or ()) if judged else ():
            one = judged[i]
            place = places[str(one[self.result_key])]
            words = f"{dataset.annotation[place]['question']}\n{one['answer']} (true: {one['truth']})"
            found.append((dataset.file(place), words))
        return found

    @main_process
    def _report_metrics(self, result_file: str, split: str) -> dict[str, Any]:
        """VQAv2's accuracy in percent, over all questions and by answer type; None where answers are not known.

        ``result/SPLIT_epoch_N_accuracy.json`` also has it by question type.
        """
        count = len(read_json(result_file))
        logging.info("answers written to %s", result_file)
        metrics: dict[str, Any] = {"agg_metrics": None, "questions": count}
        scores = None
        if split in self.anno_files:
            files = (result_file, self.ques_files[split], self.anno_files[split])
            scores = vqa_accuracy(*files, **self._possible())
            self.scores = scores.pop("scores")
            self._judged = partial(_with_truths, result_file, self.anno_files[split])
            path = Path(result_file.replace("_vqa_result.json", "_accuracy.json"))
            found = {key: _plain(value) for key, value in scores.items()}
            write_text(path, json.dumps({"split": split, "questions": count, **found}, indent=1))
            metrics.update(scores["answer_types"], agg_metrics=scores["accuracy"])
            metrics.update({f"{name}_accuracy": scores[f"{name}_accuracy"] for name in ("official", "lavis")})
            metrics.update(_reach(scores))
        print(report(split, count, scores), flush=True)
        return metrics


def _plain(value: Any) -> Any:
    """What a JSON file holds of a score."""
    if not isinstance(value, Unreachable):
        return value
    return {**value._asdict(), "examples": value.examples[:EXAMPLES]}


def _reach(scores: dict[str, Any]) -> dict[str, float]:
    """As metrics: questions without a true answer that can be given, and the accuracy that they leave."""
    found = scores.get("unreachable")
    return {} if found is None else {"unreachable": found.unreachable, "upper_bound": found.upper_bound}


def _caveats(split: str, count: int, scores: dict[str, Any]) -> list[str]:
    """A line each: other evaluators' figures where they differ, too few annotators, answers that cannot be given."""
    lines = []
    evaluators = {"official": "VQAv2's evaluator on the result file as it is", "lavis": "LAVIS's evaluator"}
    for name, whose in evaluators.items():
        other = scores.get(f"{name}_accuracy")
        if other not in (None, scores.get("accuracy")):
            lines.append(f"{split}: {whose} gives {other:.2f} %, see docs/evaluation.md#questions")
    few = scores.get("few_annotators")
    if few is not None:
        best = vqa_score(["yes"] * few["annotators"], "yes")
        reached = f", where no answer gets more than {100 * best:.0f} %" if best < 1 else ""
        lines.append(
            f"{split}: fewer than {ANNOTATORS} annotators answered {few['questions']} of {count} questions; question "
            f"{shown(few['question_id'])} has {few['annotators']}{reached}"
        )
    found = scores.get("unreachable")
    if found is not None and found.unreachable:
        lines.append(f"{split}: {found}")
    return lines


def report(split: str, count: int, scores: dict[str, Any] | None) -> str:
    """Number of questions, accuracy, accuracy by answer type, and by question type if these are not too many.

    Further lines say what has to be known to read the accuracy.
    """
    if scores is None:
        return f"{split}: {count} questions answered; their true answers are not known here"

    def listed(kind: str) -> str:
        return ", ".join(f"{name} {value:.2f}" for name, value in sorted(scores[kind].items()))

    text = f"{split}: {count} questions, accuracy {scores['accuracy']:.2f} % ({listed('answer_types')})"
    if len(scores["question_types"]) <= SHOWN_TYPES:
        text += f"\n{split}: by question type: {listed('question_types')}"
    return "\n".join([text, *_caveats(split, count, scores)])


def _with_truths(result_file: str, annotation_file: str) -> list[dict[str, Any]]:
    """Answers with the commonest one of the annotators as ``truth``, in the order of the annotations."""
    given = {str(one["question_id"]): one for one in read_json(result_file)}
    asked = read_json(annotation_file)["annotations"]
    said = {str(one["question_id"]): [answer["answer"] for answer in one["answers"]] for one in asked}
    return [{**given[i], "truth": max(answers, key=answers.count)} for i, answers in said.items()]


@registry.register_task("video_qa_aurora")
class VideoQaAuroraTask(VqaAuroraTask):
    """Answers to questions about videos, or pictures (own_vqa), generated (D.3) or ranked, and how many are right."""

    # LAVIS numbers the samples of a split; question_id need not differ.
    result_key = "instance_id"

    def _check_split(self, files: str, key: str, dataset: Dataset[Any]) -> None:
        if files.endswith(".train.storage"):
            raise AuroraError(f"run.{key}: {files} holds questions to train on; evaluate another split")
        self._check_answers(files, dataset)

    def valid_step(self, model: Any, samples: dict[str, Any]) -> list[dict[str, Any]]:
        """VQA's, with ``instance_id``, ``question`` and the true answer, ``truth``."""
        rest = zip(samples["instance_id"], samples["text_input"], samples["answer"])
        return [
            {**result, "instance_id": instance, "question": question, "truth": truth}
            for result, (instance, question, truth) in zip(super().valid_step(model, samples), rest)
        ]

    @main_process
    def _report_metrics(self, result_file: str, split: str) -> dict[str, Any]:
        """Exact match in percent, also letter by letter (``plain_accuracy``), and the number of questions."""
        results = read_json(result_file)
        scores = exact_match(results, **self._possible())
        self.scores = scores.pop("scores")
        plain = 100 * sum(result["answer"] == result["truth"] for result in results) / len(results)
        self._judged = partial(list, results)
        print(report_videos(split, len(results), scores), flush=True)
        if plain != scores["agg_metrics"]:
            print(f"{split}: {plain:.2f} % are the same text as the truth, letter by letter", flush=True)
        logging.info("answers written to %s", result_file)
        metrics = {name: value for name, value in scores.items() if name != "unreachable"}
        return {**metrics, **_reach(scores), "plain_accuracy": plain, "questions": len(results)}


def report_videos(split: str, count: int, scores: dict[str, Any]) -> str:
    """Number of questions, accuracy, and accuracy by question word; a second line on answers that cannot be given."""
    words = {name: value for name, value in scores.items() if name not in ("agg_metrics", "unreachable")}
    listed = ", ".join(f"{word} {value:.2f}" for word, value in words.items())
    text = f"{split}: {count} questions, accuracy {scores['agg_metrics']:.2f} % ({listed})"
    return "\n".join([text, *_caveats(split, count, scores)])
