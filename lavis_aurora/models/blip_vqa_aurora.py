"""Visual question answering: LAVIS's blip_vqa with a frozen backbone and Aurora's few parameters."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

import torch
from lavis.common.registry import registry
from lavis.models.blip_models.blip_outputs import BlipOutput
from lavis.models.blip_models.blip_vqa import BlipVQA
from torch import Tensor, nn
from transformers import LogitsProcessorList
from transformers.utils import ModelOutput

from lavis_aurora.common.errors import AuroraError, did_you_mean, shown
from lavis_aurora.common.paths import package_file
from lavis_aurora.config.models import VqaAuroraConfig
from lavis_aurora.config.run import INFERENCE_METHODS, AnswerRunConfig
from lavis_aurora.encoders.fused import fuse_text
from lavis_aurora.encoders.towers import (
    build_text_encoder,
    build_tokenizer,
    build_vision_encoder,
    check_vocabulary,
    encode_visual,
    visual_input,
)
from lavis_aurora.evaluation.answers import (
    AnswerList,
    CachedDecoder,
    NanCheckLogitsProcessor,
    rank_answers,
    sequence_probabilities,
)
from lavis_aurora.mode_approx.presets import PRESETS
from lavis_aurora.models import parts
from lavis_aurora.models.base import AuroraBase
from lavis_aurora.models.scoring import evaluating

ENCODER, DECODER = "text_encoder.", "text_decoder.bert."


def encoder_slot(name: str) -> str:
    """The slot of a layer when the decoder shares the encoder's (paper D.2): that of the same layer there."""
    return ENCODER + name[len(DECODER) :] if name.startswith(DECODER) else name


@registry.register_model("blip_vqa_aurora")
class BlipVqaAurora(AuroraBase, BlipVQA):
    """BLIP question answering model tuned by Aurora (paper 3.2, 3.3, D.2).

    The gate stands in the question encoder only, and there is no context enhancement. With L layers of width d,
    rank r: 9L * 2r + 2dr + 2Ld parameters are trained, 15L * 2r + 2dr + 2Ld with ``share_decoder: false``.

    Supported model types:
        - base: BLIP base, pretrained on 129M pairs with CapFilt, 480 px (default).
        - vqav2: BLIP base fine-tuned on VQAv2, as LAVIS's blip_vqa vqav2.
        - tiny: a BLIP of 2.4M weights that come with the package, for the demo and for tests.

    Examples:
        >>> from lavis_aurora import load_model_and_preprocess
        >>> model, vis, txt = load_model_and_preprocess("blip_vqa_aurora", "tiny", is_eval=True)
        >>> samples = {"image": vis["eval"](picture).unsqueeze(0), "text_input": [txt["eval"]("What is this?")]}
        >>> model.predict_answers(samples, answer_list=["a circle", "a star"])
    """

    CONFIG_CLASS = VqaAuroraConfig
    DEFAULT_MODEL_TYPE = "base"
    TRAINING_KEYS = ("text_input", "answer", "n_answers", "weight")
    WITHOUT_TRAINING = "to answer questions use model.predict_answers"
    ADAPTER_KEYS = (*AuroraBase.ADAPTER_KEYS, "share_decoder")
    PRETRAINED_MODEL_CONFIG_DICT = {
        name: package_file(f"configs/models/blip_vqa_aurora_{name}.yaml") for name in ("base", "vqav2", "tiny")
    }

    def __init__(self, cfg: VqaAuroraConfig) -> None:
        vision = build_vision_encoder(cfg)
        encoder = build_text_encoder(cfg, vision.vision_width)
        width = encoder.config.hidden_size
        if width != encoder.config.encoder_width:
            raise AuroraError(
                f"model.med_config_path: {cfg.med_config_path} has hidden_size {width} and encoder_width "
                f"{encoder.config.encoder_width}; the answer decoder attends to questions as the encoder to images, "
                f"so they must be equal"
            )
        decoder = CachedDecoder.from_config(vars(cfg))
        fuse_text(decoder.bert, attends_to_images=False)
        # LAVIS calls this class method in its constructor, without telling it the tokenizer's name.
        self.init_tokenizer = partial(build_tokenizer, cfg.tokenizer)
        super().__init__(vision, encoder, decoder, max_txt_len=cfg.max_txt_len)
        del self.init_tokenizer
        check_vocabulary(self.tokenizer, encoder.config.vocab_size, cfg)
        self.mask_question_padding = cfg.mask_question_padding
        self.rank_chunk = cfg.rank_chunk
        self.tuning = cfg.tuning
        self._answers: AnswerList | None = None
        slot_name = {"slot_name": encoder_slot} if cfg.share_decoder else {}
        self.set_up_tuning(cfg, PRESETS["blip_vqa_aurora"], self.text_encoder, **slot_name)

    @property
    def heads(self) -> list[nn.Module]:
        """None: the language model head belongs to the pretrained decoder."""
        return []

    @property
    def positions(self) -> int:
        """Tokens that the decoder has room for."""
        return self.text_decoder.config.max_position_embeddings

    def fill_missing_weights(self, state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
        """A checkpoint without any decoder gets one, if it is to be trained: the encoder, with a new head.

        BLIP's pretraining checkpoints hold a decoder, those fine-tuned for retrieval do not.

        Raises:
            AuroraError: there is no decoder and the model would keep a random one.
        """
        if any(key.startswith("text_decoder.") for key in state):
            return state
        if self.tuning != "full":
            raise AuroraError(
                f"{source} has no answer decoder (text_decoder), which model.tuning: {self.tuning} would leave "
                f"random; name a pretraining checkpoint of BLIP, or set model.tuning: full"
            )
        logging.warning("%s has no answer decoder: it starts as the text encoder, its head at random", source)
        own = {key: value for key, value in self.state_dict().items() if key.startswith("text_decoder.")}
        decoder = {key: state.get(encoder_slot(key), value) for key, value in own.items()}
        # One tensor under two names: input and output embeddings.
        tied = "text_decoder.cls.predictions.decoder.weight"
        decoder[tied] = decoder[f"{DECODER}embeddings.word_embeddings.weight"]
        return {**state, **decoder}

    def forward_encoder(self, samples: dict) -> tuple[ModelOutput, Tensor]:
        """Questions fused with pictures, or with all frames of videos (paper D.2); arguments are LAVIS's.

        Returns:
            the question encoder's output, and the visual tokens.
        """
        visual = encode_visual(self.visual_encoder, samples["image"]).tokens
        questions = self.tokenize(samples["text_input"], pad_to_longest=True, device=self.device)
        questions.input_ids[:, 0] = self.tokenizer.enc_token_id
        samples["tokenized_text"] = questions
        return self.text_encoder.forward_automask(tokenized_text=questions, visual_embeds=visual), visual

    def forward(self, samples: dict) -> BlipOutput:
        """Language model loss of the answers, weighted, per question.

        Args:
            samples: ``image`` (batch, 3, height, width) or ``video`` (batch, 3, frames, height, width),
                ``text_input`` (questions), ``answer`` (list of str, those of the first question first), ``n_answers``
                (batch,), ``weight`` (answers,), as for LAVIS's blip_vqa.

        Raises:
            AuroraError: samples lack one of these, a question is empty, or answers are missing or too long.
        """
        self.check_trained()
        self.check_samples(samples)
        # LAVIS reads the size of the batch from its image.
        samples = {**samples, "image": visual_input(samples)}
        self._check_questions(samples["text_input"], samples["image"])
        counts, answers = samples["n_answers"], samples["answer"] or []
        # On the host at once: LAVIS asks for them one by one.
        counts = None if counts is None else counts.tolist()
        if not counts or not answers or len(answers) != sum(counts):
            raise AuroraError(
                f"samples: {len(answers)} answers, n_answers {counts}; "
                f"training needs at least one answer, and n_answers must say how many each question has"
            )
        # A token is a character or more, and two are special: most answers need no count.
        if any(len(answer) + 2 > self.positions for answer in answers):
            AnswerList(answers, self.tokenizer, self.positions)
        with parts.recomputed_activations(self):
            return super().forward({**samples, "n_answers": counts})

    @torch.no_grad()
    def predict_answers(
        self,
        samples: dict,
        num_beams: int = AnswerRunConfig.num_beams,
        inference_method: str = AnswerRunConfig.inference_method,
        max_len: int = AnswerRunConfig.max_len,
        min_len: int = AnswerRunConfig.min_len,
        num_ans_candidates: int = AnswerRunConfig.num_ans_candidates,
        answer_list: Sequence[str] | None = None,
        prompt: str = AnswerRunConfig.prompt,
        return_scores: bool = False,
        **_kwargs,
    ) -> list[str] | tuple[list[str], list[float]]:
        """Answers to questions, one each, in eval mode; a model in training stays in training.

        Args:
            samples: ``image`` (batch, 3, height, width) or ``video`` (batch, 3, frames, height, width), and
                ``text_input``, a question or a list of them.
            num_beams: of generation; 1 is greedy.
            inference_method: rank (the likeliest of ``answer_list``) or generate.
            max_len: tokens of a generated answer, [DEC] included.
            min_len: tokens of a generated answer at least.
            num_ans_candidates: answers scored as a whole, those with the likeliest first token.
            answer_list: what to choose from, of any length.
            prompt: wording around the question, ``{}`` in the question's place.
            return_scores: give confidences too.

        Returns:
            The answers; with ``return_scores`` also their confidences, from 0 to 1: of a ranked answer its share
            among the candidates (:func:`rank_answers`), of a generated one its probability
            (:func:`sequence_probabilities`).

        Raises:
            AuroraError: a question is empty, there is not one for each image, there is no list to rank, or scores of
                answers are NaN.
        """
        if inference_method not in INFERENCE_METHODS:
            near = did_you_mean(str(inference_method), INFERENCE_METHODS)
            raise AuroraError(f"inference_method: unknown method {inference_method!r}{near}")
        if inference_method == "rank" and not answer_list:
            raise AuroraError("answer_list: missing; inference_method rank chooses from a list, generate needs none")
        if inference_method == "generate" and max_len > self.positions:
            raise AuroraError(f"max_len: {max_len} tokens do not fit the {self.positions} positions of the decoder")
        questions = samples.get("text_input", [])
        questions = [questions] if isinstance(questions, str) else list(questions)
        visual = visual_input(samples)
        self._check_questions(questions, visual)
        if prompt:
            questions = [prompt.replace("{}", question) for question in questions]
        with evaluating(self):
            asked = {**samples, "image": visual, "text_input": questions}
            if inference_method == "rank":
                answers, confidences = self._rank_answers(asked, answer_list, num_ans_candidates)
            else:
                answers, confidences = self._generate_answers(asked, num_beams, max_len, min_len, return_scores)
        return (answers, confidences) if return_scores else answers

    @staticmethod
    def _check_questions(questions: Sequence[str], visual: Tensor) -> None:
        if len(questions) != len(visual):
            kind = "images" if visual.dim() == 4 else "videos"
            raise AuroraError(f"samples: {len(questions)} questions for {len(visual)} {kind}; there must be one each")
        for i, question in enumerate(questions):
            if not isinstance(question, str) or not question.strip():
                raise AuroraError(f"samples: question {i} of the batch is {shown(question)}; it must have words")

    def _generate_answers(
        self, samples: dict, num_beams: int, max_length: int, min_length: int, return_scores: bool
    ) -> tuple[list[str], list[float]]:
        """LAVIS's, with the padding of questions masked if so configured; confidences too, if they are asked for."""
        states = self.forward_encoder(samples)[0].last_hidden_state
        mask = samples["tokenized_text"].attention_mask
        if not self.mask_question_padding:
            mask = torch.ones_like(mask)
        tokens = self.text_decoder.generate(
            input_ids=mask.new_full((len(mask), 1), self.tokenizer.bos_token_id),
            encoder_hidden_states=states.repeat_interleave(num_beams, dim=0),
            encoder_attention_mask=mask.repeat_interleave(num_beams, dim=0),
            num_beams=num_beams,
            max_length=max_length,
            min_length=min_length,
            eos_token_id=self.tokenizer.sep_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            logits_processor=LogitsProcessorList([NanCheckLogitsProcessor()]),
        )
        answers = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        if not return_scores:
            return answers, []
        return answers, sequence_probabilities(self.text_decoder, states, mask, tokens, self.tokenizer.sep_token_id)

    def _rank_answers(
        self, samples: dict, answer_list: Sequence[str], num_ans_candidates: int
    ) -> tuple[list[str], list[float]]:
        """LAVIS's, in bounded memory; the list is tokenized once; confidences too."""
        states = self.forward_encoder(samples)[0].last_hidden_state
        mask = samples["tokenized_text"].attention_mask
        if self._answers is None or self._answers.given != list(answer_list):
            self._answers = AnswerList(answer_list, self.tokenizer, self.positions)
        best, scores = rank_answers(
            self.text_decoder, states, mask, self._answers, num_ans_candidates, chunk=self.rank_chunk
        )
        return [self._answers.texts[i] for i in best], scores
