"""Generative Adversarial Distillation in 200 lines of plain PyTorch, without gad-fast.

    python examples/gad_in_200_lines.py

A teacher's sentence opens with one of three words, has two fillers, and closes with the word that
belongs to the opening. The student sees only the word before, so it cannot remember what it opened
with: imitation (SeqKD) is right a third of the time. Against a discriminator that reads whole
sentences it learns to commit to one opening and its closing. The probability of every sentence is
known, so the reverse KL is exact. Takes about half a minute on one CPU thread.
"""

import copy
import math
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import softplus

BEGIN, END, PAD = 0, 1, 2
WEIGHTS = torch.tensor([0.40, 0.35, 0.25])  # of the three openings
FILLER_WEIGHTS = torch.tensor([12.0, 6.0, 4.0, 3.0]) / 25  # Zipf
NUM_FILLERS, NUM_WORDS = 2, len(FILLER_WEIGHTS)
# First token of each kind of word; every place in a sentence has words of its own.
OPENINGS, FILLERS = 3, 3 + len(WEIGHTS)
CLOSINGS = FILLERS + NUM_FILLERS * NUM_WORDS
VOCABULARY = CLOSINGS + len(WEIGHTS)
LENGTH = 1 + NUM_FILLERS + 1  # words of a sentence, END not counted
NOISE = 0.01  # chance that a word is replaced by any word
LOG_FLOOR = math.log(1e-8)  # for sentences of a wrong length


def teacher_sentences(count: int, generator: torch.Generator) -> Tensor:
    """Samples sentences, int64 [count, LENGTH + 1], each closed by END."""
    pair = torch.multinomial(WEIGHTS, count, replacement=True, generator=generator)
    shape = (NUM_FILLERS, count)
    words = torch.multinomial(FILLER_WEIGHTS, math.prod(shape), True, generator=generator)
    fillers = [FILLERS + i * NUM_WORDS + word for i, word in enumerate(words.view(shape))]
    sentence = torch.stack([OPENINGS + pair, *fillers, CLOSINGS + pair], dim=1)
    any_word = torch.randint(OPENINGS, VOCABULARY, sentence.shape, generator=generator)
    is_noise = torch.rand(sentence.shape, generator=generator) < NOISE
    sentence = torch.where(is_noise, any_word, sentence)
    return torch.cat([sentence, torch.full((count, 1), END)], dim=1)


def teacher_logprob(sentences: Tensor) -> tuple[Tensor, Tensor]:
    """Exact log-probability of sentences [N, LENGTH + 1], and whether they are grammatical."""
    words, uniform = sentences[:, :LENGTH], NOISE / (VOCABULARY - OPENINGS)
    is_whole = (words != END).all(dim=1) & (sentences[:, LENGTH] == END)

    def chance(place: int, expected: Tensor) -> Tensor:
        return (1 - NOISE) * (words[:, place, None] == expected).float() + uniform

    pairs = torch.arange(len(WEIGHTS))
    both = chance(0, OPENINGS + pairs) * chance(LENGTH - 1, CLOSINGS + pairs)  # [N, pairs]
    logprob = (WEIGHTS * both).sum(dim=1).log()
    is_opening = (words[:, 0] >= OPENINGS) & (words[:, 0] < FILLERS)
    is_valid = is_whole & is_opening & (words[:, -1] - CLOSINGS == words[:, 0] - OPENINGS)
    for place in range(NUM_FILLERS):
        known = FILLERS + place * NUM_WORDS + torch.arange(NUM_WORDS)
        is_filler = words[:, 1 + place, None] == known
        logprob += ((1 - NOISE) * (FILLER_WEIGHTS * is_filler).sum(dim=1) + uniform).log()
        is_valid &= is_filler.any(dim=1)
    return torch.where(is_whole, logprob, torch.tensor(LOG_FLOOR)), is_valid


SIZES: dict[str, Any] = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64)
SIZES |= dict(num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32)
# PAD is not BEGIN: the embedding of the pad token is never trained.
SIZES |= dict(bos_token_id=BEGIN, eos_token_id=END, pad_token_id=PAD)


def make_student() -> transformers.PreTrainedModel:
    """A language model that attends to the current word only."""
    config = transformers.MistralConfig(**SIZES, num_hidden_layers=1, sliding_window=1)
    return transformers.MistralForCausalLM(config).eval()


def make_discriminator() -> transformers.PreTrainedModel:
    """A model that reads the whole sentence and scores it at its last token."""
    config = transformers.LlamaConfig(**SIZES, num_hidden_layers=2, id2label={0: "score"})
    return transformers.LlamaForSequenceClassification(config).eval()


@torch.no_grad()
def sample(student: nn.Module, count: int, temperature: float = 1.0) -> Tensor:
    """Samples rollouts [count, LENGTH + 1]; what follows END is END."""
    tokens, is_done = torch.full((count, 1), BEGIN), torch.zeros(count, dtype=torch.bool)
    for _ in range(LENGTH + 1):
        probs = (student(input_ids=tokens).logits[:, -1] / temperature).softmax(dim=-1)
        token = torch.multinomial(probs, 1)[:, 0].masked_fill(is_done, END)
        is_done |= token == END
        tokens = torch.cat([tokens, token[:, None]], dim=1)
    return tokens[:, 1:]


def real_tokens(responses: Tensor) -> Tensor:
    """True up to and including the first END."""
    return ((responses == END).cumsum(dim=1) - (responses == END).long()) == 0


def token_logprobs(student: nn.Module, responses: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each token, [N, LENGTH + 1]."""
    inputs = torch.cat([torch.full((len(responses), 1), BEGIN), responses[:, :-1]], dim=1)
    logprobs = (student(input_ids=inputs).logits / temperature).log_softmax(dim=-1)
    return logprobs.gather(2, responses[..., None])[..., 0]


def scores(discriminator: Any, responses: Tensor) -> Tensor:
    """Score of each response at its last real token, [N]."""
    inputs = torch.cat([torch.full((len(responses), 1), BEGIN), responses], dim=1)
    hidden = discriminator.model(input_ids=inputs).last_hidden_state
    last = real_tokens(responses).sum(dim=1)  # BEGIN shifts by one
    return discriminator.score(hidden[torch.arange(len(responses)), last])[:, 0]


def update(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One clipped step."""
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def train_discriminator(discriminator, optimizer, rollouts, teacher) -> tuple[float, Tensor]:
    """Bradley-Terry on B groups [B, G, L] against B teacher sentences [B, L].

    Returns the loss, and the rollouts' scores [B, G] before the update: the student's rewards.
    """
    student_scores = scores(discriminator, rollouts.flatten(0, 1)).unflatten(0, rollouts.shape[:2])
    teacher_scores = scores(discriminator, teacher)
    loss = softplus(student_scores - teacher_scores[:, None]).mean()
    update(discriminator, optimizer, loss)
    return loss.item(), student_scores.detach()


def train_student(student, reference, optimizer, rollouts, rewards, kl_coef) -> float:
    """Policy gradient on centred rewards [B, G], with the k3 estimate of the KL to a reference."""
    advantages = (rewards - rewards.mean(dim=1, keepdim=True)).flatten()[:, None]
    responses = rollouts.flatten(0, 1)
    logprobs = token_logprobs(student, responses)
    difference = token_logprobs(reference, responses).detach() - logprobs
    kl = difference.exp() - difference - 1
    ratio = (logprobs - logprobs.detach()).exp()  # 1, with the gradient of the log-probability
    mask = real_tokens(responses)
    loss = ((-advantages * ratio + kl_coef * kl) * mask).sum() / mask.sum()
    update(student, optimizer, loss)
    return loss.item()


def imitate(student, optimizer, teacher) -> float:
    """Cross-entropy of teacher sentences [N, L]."""
    mask = real_tokens(teacher)
    loss = -(token_logprobs(student, teacher) * mask).sum() / mask.sum()
    update(student, optimizer, loss)
    return loss.item()


@torch.no_grad()
def evaluate(student: nn.Module, temperature: float = 1.0) -> tuple[float, float]:
    """Share of grammatical sentences, and KL(student || teacher) in nats, of 4000 rollouts."""
    rollouts = sample(student, 4000, temperature)
    logprob, is_valid = teacher_logprob(rollouts)
    own = (token_logprobs(student, rollouts, temperature) * real_tokens(rollouts)).sum(dim=1)
    return is_valid.float().mean().item(), (own - logprob).mean().item()


def main(seed: int = 0) -> None:
    """SeqKD, then the game from there."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    student, discriminator = make_student(), make_discriminator()
    adam = torch.optim.AdamW(student.parameters(), lr=3e-3)
    for step in range(1000):
        adam.param_groups[0]["lr"] = 3e-3 * (1 - 0.9 * step / 1000)
        imitate(student, adam, teacher_sentences(64, generator))
    for temperature in (1.0, 0.8, 0.6, 0.4):
        validity, reverse_kl = evaluate(student, temperature)
        print(f"SeqKD at T {temperature}: valid {validity:.2f}, reverse KL {reverse_kl:.2f}")

    reference = copy.deepcopy(student)
    adam = torch.optim.AdamW(student.parameters(), lr=3e-4)
    discriminator_adam = torch.optim.AdamW(discriminator.parameters(), lr=3e-3)
    num_warmup, num_game = 150, 500
    for step in range(num_warmup + num_game):
        rollouts = sample(student, 16 * 8).unflatten(0, (16, 8))
        teacher = teacher_sentences(16, generator)
        loss, rewards = train_discriminator(discriminator, discriminator_adam, rollouts, teacher)
        if step >= num_warmup:
            adam.param_groups[0]["lr"] = 3e-4 * (1 - 0.95 * (step - num_warmup) / num_game)
            train_student(student, reference, adam, rollouts, rewards, kl_coef=0.001)
        if step % 50 == 49:
            validity, reverse_kl = evaluate(student)
            print(f"step {step + 1}: d_loss {loss:.3f}, valid {validity:.2f}, KL {reverse_kl:.2f}")


if __name__ == "__main__":
    main()
