"""GAD as one would build it on TRL: GRPOTrainer, and a reward function that learns.

The reward function scores the rollouts with a one-label classifier on the student's backbone and
then updates it, with the Bradley-Terry loss against the teacher's responses: the official recipe's
passes, with what TRL and transformers offer.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from step_cost.measure import peak_gib
from step_cost.work import KL_COEF, LEARNING_RATE, TEMPERATURE, Cost, Size, rows

SEQUENCES_AT_ONCE = 16


class LearningReward:
    """Scores rollouts, then learns from them."""

    __name__ = "discriminator"

    def __init__(self, model: str, dtype: str) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(model)
        # The classifier pools before the padding: the end token must not be the pad token.
        self._tokenizer.pad_token = _pad_token(self._tokenizer)
        self._classifier: Any = AutoModelForSequenceClassification.from_pretrained(
            model, num_labels=1, dtype=torch.float32
        )
        self._classifier.config.pad_token_id = self._tokenizer.pad_token_id
        self._optimizer = torch.optim.AdamW(self._classifier.parameters(), lr=LEARNING_RATE)
        self._is_mixed = dtype == "bfloat16"
        self.seconds: list[float] = []

    def __call__(
        self, prompts: list[Any], completions: list[Any], teacher_response: list[str], **_: Any
    ) -> list[float]:
        """Scores as they were before the update."""
        start = time.perf_counter()
        student = [[*prompt, *answer] for prompt, answer in zip(prompts, completions, strict=True)]
        teacher = [
            [*prompt, {"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, teacher_response, strict=True)
        ]
        with torch.no_grad():
            scores = torch.cat([self._score(part) for part in _parts(student)]).tolist()
        for ours, theirs in zip(_parts(student), _parts(teacher), strict=True):
            loss = -logsigmoid(self._score(theirs) - self._score(ours)).sum() / len(student)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self._classifier.parameters(), 0.2)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - start)
        return scores

    def _score(self, chats: list[Any]) -> Tensor:
        texts = self._tokenizer.apply_chat_template(chats, tokenize=False)
        batch = self._tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.autocast("cpu", torch.bfloat16, enabled=self._is_mixed):
            return self._classifier(**batch).logits.squeeze(-1).float()


class TimedTrainer(GRPOTrainer):
    """Notes how long it samples, and how much."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.rollout_seconds: list[float] = []
        self.rollout_tokens: list[int] = []

    def _generate_single_turn(self, *arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        result = super()._generate_single_turn(*arguments, **options)
        self.rollout_seconds.append(time.perf_counter() - start)
        self.rollout_tokens.append(sum(len(ids) for ids in result[0]))
        return result


class StepTimer(TrainerCallback):
    """Seconds of each whole step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """A step begins with its rollouts."""
        self._start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """It ends after the student's update."""
        self.seconds.append(time.perf_counter() - self._start)


def run(model: str, size: Size, dtype: str, num_steps: int, folder: Path) -> Cost:
    """Trains for some steps; arguments as in `here.run`."""
    reward, timer = LearningReward(model, dtype), StepTimer()
    trainer = TimedTrainer(
        model=model,
        reward_funcs=reward,
        args=_config(size, dtype, num_steps, folder),
        train_dataset=_dataset(size, num_steps),
        callbacks=[timer],
    )
    trainer.train()
    seconds = _medians(timer, trainer, reward)
    return Cost(seconds, statistics.fmean(trainer.rollout_tokens[1:]), peak_gib())


def _config(size: Size, dtype: str, num_steps: int, folder: Path) -> GRPOConfig:
    num_rollouts = size.prompts * size.group_size
    at_once = min(num_rollouts, SEQUENCES_AT_ONCE)
    return GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=num_rollouts // at_once,
        num_generations=size.group_size,
        max_completion_length=size.response_tokens,
        temperature=TEMPERATURE,
        beta=KL_COEF,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0.2,
        max_steps=num_steps,
        bf16=dtype == "bfloat16",
        gradient_checkpointing=False,
        use_cpu=True,
        model_init_kwargs={"dtype": "float32"},
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )


def _dataset(size: Size, num_steps: int) -> Dataset:
    return Dataset.from_list(
        [
            {"prompt": row.messages, "teacher_response": row.teacher_response}
            for row in rows(size, num_steps)
        ]
    )


def _medians(timer: StepTimer, trainer: TimedTrainer, reward: LearningReward) -> dict[str, float]:
    by_phase = defaultdict(list)
    for step, rollout, discriminator in zip(
        timer.seconds, trainer.rollout_seconds, reward.seconds, strict=True
    ):
        by_phase["rollout"].append(rollout)
        by_phase["discriminator"].append(discriminator)
        by_phase["student"].append(step - rollout - discriminator)
        by_phase["step"].append(step)
    return {phase: statistics.median(seconds[1:]) for phase, seconds in by_phase.items()}


def _parts(chats: list[Any]) -> list[list[Any]]:
    return [
        chats[start : start + SEQUENCES_AT_ONCE]
        for start in range(0, len(chats), SEQUENCES_AT_ONCE)
    ]


def _pad_token(tokenizer: Any) -> str:
    candidates = [token for token in tokenizer.all_special_tokens if token != tokenizer.eos_token]
    return candidates[0]
