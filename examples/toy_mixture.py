"""The paper's toy (its Figure 5): imitation spreads over a teacher's modes, GAD picks one.

    python examples/toy_mixture.py [--output toy_mixture.png] [--seeds 5]

The teacher is a mixture of two bumps over ten categories; the student is a single bump, so it can
never match. Both are known exactly, but learning sees only samples of the teacher. Imitation
(SeqKD) covers both bumps and the void between them, with the flank of a bump centred outside the
categories. GAD, against a discriminator of ten free scores, settles on the larger bump. Against one
that no longer learns, the student climbs its score until all samples are the same: reward hacking.

The bumps are unequal and far apart on purpose: between equal ones, imitation's answer is also a
local minimum of the reverse KL, where a correct GAD stays. Takes a few seconds on one CPU thread.
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from gad_fast import kernels

NUM_CATEGORIES = 10
CATEGORIES = torch.arange(NUM_CATEGORIES, dtype=torch.float64)
MODES, MODE_WEIGHTS, MODE_WIDTH = (1, 8), (0.8, 0.2), 0.7
NOISE = 0.001  # share of the uniform distribution in the teacher: no category is impossible
TEMPERATURES = (1.0, 0.8, 0.6, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05)
FINAL_STEPS = 500  # results are means over these, as the student of one step is noisy


@dataclass(frozen=True)
class Settings:
    """One experiment; all its seeds are trained at once, along the leading dimension S."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    num_groups: int = 8
    """Teacher samples in a step of the game."""
    group_size: int = 8
    """Student samples against each of them."""
    warmup_steps: int = 300
    warmup_learning_rate: float = 0.05
    steps: int = 2000
    """After the warm-up; as many for SeqKD as for the game."""
    student_learning_rate: float = 0.01
    discriminator_learning_rate: float = 0.2
    """20 times the student's: below 10 times, the discriminator lags behind the student."""
    is_frozen: bool = False
    """The discriminator learns in the warm-up only."""


# --- the players ----------------------------------------------------------------------------------


def bump_logprobs(mean: Tensor, log_width: Tensor) -> Tensor:
    """A Gaussian read at the ten categories and normalised there: float [S, 10]."""
    distance = (CATEGORIES - mean[:, None]) / log_width.exp()[:, None]
    return (-0.5 * distance**2).log_softmax(dim=-1)


def teacher_logprobs() -> Tensor:
    """The teacher's log-probabilities, float [10]; learning sees samples only."""
    means, weights = (torch.tensor(each, dtype=torch.float64) for each in (MODES, MODE_WEIGHTS))
    bumps = bump_logprobs(means, torch.full_like(means, MODE_WIDTH).log()).exp()
    return ((1 - NOISE) * (weights @ bumps) + NOISE / NUM_CATEGORIES).log()


class Players:
    """The student and the discriminator of every seed, which has random numbers of its own."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.generators = [torch.Generator().manual_seed(seed) for seed in settings.seeds]
        start = [torch.randn(1, generator=g, dtype=torch.float64) for g in self.generators]
        self.mean = (4.5 + 0.5 * torch.cat(start)).requires_grad_()
        self.log_width = torch.full_like(self.mean, 0.7).requires_grad_()
        self.scores = self.mean.new_zeros(len(start), NUM_CATEGORIES).requires_grad_()
        self.teacher = teacher_logprobs().expand(len(start), -1)
        # Adam treats each number alone, so one optimizer serves all seeds without mixing them.
        self.discriminator_adam = torch.optim.Adam([self.scores])

    def student(self) -> Tensor:
        """Log-probabilities [S, 10]."""
        return bump_logprobs(self.mean, self.log_width)

    def sample(self, logprobs: Tensor, count: int) -> Tensor:
        """Categories drawn from logprobs [S, 10], int64 [S, count]."""
        uniform = [torch.rand(count, generator=g, dtype=torch.float64) for g in self.generators]
        samples = torch.searchsorted(logprobs.exp().cumsum(dim=-1).detach(), torch.stack(uniform))
        return samples.clamp_max(NUM_CATEGORIES - 1)  # the last sum may be just below 1

    def rewards(self, rollouts: Tensor) -> Tensor:
        """The discriminator's scores of rollouts [S, B * G], float [S * B, G]."""
        return self.scores.gather(1, rollouts).view(-1, self.settings.group_size)

    def train_discriminator(self, rollouts: Tensor, teacher: Tensor) -> None:
        """Bradley-Terry on rollouts [S, B * G] against teacher samples [S, B]."""
        teacher_scores = self.scores.gather(1, teacher).flatten()
        # Mean over a seed's pairs, sum over seeds: a seed does not feel how many others there are.
        scores, num_pairs = self.rewards(rollouts), rollouts.shape[1]
        loss, _ = kernels.bradley_terry_loss(teacher_scores, scores, num_pairs=num_pairs)
        update(self.discriminator_adam, loss, self.settings.discriminator_learning_rate)


def update(adam: torch.optim.Optimizer, loss: Tensor, learning_rate: float) -> None:
    """One step."""
    adam.param_groups[0]["lr"] = learning_rate
    adam.zero_grad()
    loss.backward()
    adam.step()


# --- the runs -------------------------------------------------------------------------------------


class Game(NamedTuple):
    """What each step of a game started from."""

    student: Tensor
    """Log-probabilities, float [steps, S, 10]."""
    scores: Tensor
    """The discriminator's, float [steps, S, 10]."""


def imitate(players: Players, adam: torch.optim.Optimizer, learning_rate: float) -> Tensor:
    """One step of maximum likelihood; returns the teacher's samples, int64 [S, B * G]."""
    num_samples = players.settings.num_groups * players.settings.group_size
    teacher = players.sample(players.teacher, num_samples)
    loss = -players.student().gather(1, teacher).mean(dim=1).sum()
    update(adam, loss, learning_rate)
    return teacher


def warm_up(settings: Settings) -> Players:
    """Students trained by imitation, and discriminators trained along with them."""
    players = Players(settings)
    adam = torch.optim.Adam([players.mean, players.log_width])
    for _ in range(settings.warmup_steps):
        rollouts = players.sample(players.student(), settings.num_groups * settings.group_size)
        teacher = imitate(players, adam, settings.warmup_learning_rate)
        players.train_discriminator(rollouts, teacher[:, : settings.num_groups])
    return players


def run_seqkd(settings: Settings) -> Tensor:
    """The warmed-up student goes on imitating; log-probabilities [steps, S, 10].

    It gets as many updates as in the game, each from `group_size` times the teacher samples.
    """
    players, students = warm_up(settings), []
    adam = torch.optim.Adam([players.mean, players.log_width])
    for _ in range(settings.steps):
        students.append(players.student().detach())
        imitate(players, adam, settings.student_learning_rate)
    return torch.stack(students)


def run_gad(settings: Settings) -> Game:
    """The warmed-up student plays: REINFORCE on the discriminator's scores of its own samples."""
    players, students, scores = warm_up(settings), [], []
    adam = torch.optim.Adam([players.mean, players.log_width])
    for _ in range(settings.steps):
        student = players.student()
        students.append(student.detach())
        scores.append(players.scores.detach().clone())
        rollouts = players.sample(student, settings.num_groups * settings.group_size)
        teacher = players.sample(players.teacher, settings.num_groups)
        rewards = players.rewards(rollouts).detach()  # of the discriminator before its update
        if not settings.is_frozen:
            players.train_discriminator(rollouts, teacher)
        advantages = kernels.group_advantages(rewards, eps=1e-6).view_as(rollouts)
        loss = -(advantages * student.gather(1, rollouts)).mean(dim=1).sum()
        update(adam, loss, settings.student_learning_rate)
    return Game(torch.stack(students), torch.stack(scores))


# --- what came of it, from the exact distributions ------------------------------------------------


class Metrics(NamedTuple):
    """Means over the last steps, each float [S]."""

    variance: Tensor
    mode_mass: Tensor
    """Probability of the best mode and its two neighbours."""
    forward_kl: Tensor
    """KL(teacher || student) in nats: large when a mode is missed."""
    reverse_kl: Tensor
    """KL(student || teacher) in nats: large when the student says what the teacher would not."""


def measure(student: Tensor) -> Metrics:
    """Metrics of log-probabilities [steps, S, 10]."""
    logprobs, teacher = student[-FINAL_STEPS:], teacher_logprobs()
    probs = logprobs.exp()
    mean = (probs @ CATEGORIES)[..., None]
    variance = (probs * (CATEGORIES - mean) ** 2).sum(dim=-1)
    masses = [probs[..., mode - 1 : mode + 2].sum(dim=-1) for mode in MODES]
    mode_mass = torch.stack(masses).amax(dim=0)
    forward_kl = (teacher.exp() * (teacher - logprobs)).sum(dim=-1)
    reverse_kl = (probs * (logprobs - teacher)).sum(dim=-1)
    by_step = (variance, mode_mass, forward_kl, reverse_kl)
    return Metrics(*(each.mean(dim=0) for each in by_step))


def measure_at_best_temperature(student: Tensor) -> Metrics:
    """Metrics at the temperature of least reverse KL, chosen for each seed with hindsight."""
    each = [measure((student / t).log_softmax(dim=-1)) for t in TEMPERATURES]
    best = torch.stack([metrics.reverse_kl for metrics in each]).argmin(dim=0, keepdim=True)
    return Metrics(*(torch.stack(values).gather(0, best)[0] for values in zip(*each, strict=True)))


def held_out_scores(student: Tensor) -> Tensor:
    """Scores of the best discriminator there can be against each step's student, [steps, S, 10].

    This is log p_teacher / p_student, exact. A second set of logits trained on other samples would
    only approach it, and its lag behind the student could be mistaken for the student's merit. What
    Bradley-Terry converges to is an increasing function of this ratio, so that `win_rate` is the
    same for both.
    """
    return teacher_logprobs() - student


def score_gap(scores: Tensor, student: Tensor) -> Tensor:
    """Mean score under the student minus mean score under the teacher, [steps, S].

    With the scores of a frozen discriminator it is the student's mean reward, up to a constant.
    """
    return ((student.exp() - teacher_logprobs().exp()) * scores).sum(dim=-1)


def win_rate(scores: Tensor, student: Tensor) -> Tensor:
    """Share of pairs in which the student's sample outscores the teacher's, [steps, S]; ties half.

    One half means that the discriminator sees no difference, or is fooled as often as not.
    """
    wins = 0.5 + 0.5 * (scores[..., :, None] - scores[..., None, :]).sign()
    return torch.einsum("...s,t,...st->...", student.exp(), teacher_logprobs().exp(), wins)


# --- table and figure -----------------------------------------------------------------------------


def print_table(rows: dict[str, Metrics]) -> None:
    """Mean +- standard deviation over seeds."""
    print(" " * 28 + "".join(f"{name.replace('_', ' '):>17}" for name in Metrics._fields))
    for label, metrics in rows.items():
        cells = [f"{each.mean():.2f} +- {each.std():.2f}" for each in metrics]
        print(f"{label:<28}" + "".join(f"{cell:>17}" for cell in cells))


def plot(seqkd: Tensor, gad: Game, frozen: Game, output: Path) -> None:
    """Left, the final distributions, mean over seeds; right, whom hacking fools, seed by seed."""
    import matplotlib.pyplot as plt  # here, because the test needs no matplotlib
    from matplotlib.ticker import PercentFormatter

    gray, amber, teal, red, ink = "#6f767e", "#c9821a", "#1f6f8b", "#c8414f", "#2f353b"
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 4.3), width_ratios=(1.4, 1), layout="constrained"
    )
    left.bar(CATEGORIES, teacher_logprobs().exp(), color="#d9dce0")
    for student, color, marker in ((seqkd, amber, "s"), (gad.student, teal, "o")):
        probs = student[-FINAL_STEPS:].exp().mean(dim=(0, 1))
        left.plot(CATEGORIES, probs, color=color, marker=marker, linewidth=2, clip_on=False)
    left.text(8, 0.122, "teacher", color=gray, ha="center")
    left.text(3.6, 0.125, "SeqKD covers everything", color=amber)
    left.text(1.35, 0.53, "GAD settles on one mode", color=teal)
    left.set(xlabel="category", ylabel="probability", xticks=range(NUM_CATEGORIES), ylim=(0, 0.62))
    left.set_title("A student too small for its teacher", loc="left", pad=12)

    num_steps = len(frozen.student)
    for scores, color in ((frozen.scores, red), (held_out_scores(frozen.student), ink)):
        rates = win_rate(scores, frozen.student)
        right.plot(rates, color=color, linewidth=0.7, alpha=0.35)
        right.plot(rates.mean(dim=1), color=color, linewidth=2.2)
    right.axhline(0.5, color=gray, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    right.text(num_steps, 0.82, "says the frozen discriminator", color=red, ha="right")
    right.text(num_steps, 0.515, "a tie", color=gray, ha="right")
    right.text(num_steps, 0.15, "says the best possible one", color=ink, ha="right")
    right.set(xlabel="step of the game", ylabel="pairs in which the student beats the teacher")
    right.set(xlim=(0, num_steps), ylim=(0, 1), xticks=range(0, num_steps + 1, 500))
    right.yaxis.set_major_formatter(PercentFormatter(1.0))
    right.set_title("A frozen discriminator is hacked", loc="left", pad=12)

    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(output, dpi=160)


def main() -> None:
    """Plays the three games, prints the table and draws the figure."""
    parser = argparse.ArgumentParser(description="imitation and GAD on a toy mixture")
    parser.add_argument("--output", type=Path, default=Path("toy_mixture.png"))
    parser.add_argument("--seeds", type=int, default=5, help="at least 2")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # tensors too small for threads to pay

    settings = Settings(seeds=tuple(range(arguments.seeds)))
    seqkd, gad = run_seqkd(settings), run_gad(settings)
    frozen = run_gad(replace(settings, is_frozen=True))
    rows = {"SeqKD": measure(seqkd), "SeqKD, best temperature": measure_at_best_temperature(seqkd)}
    rows |= {"GAD": measure(gad.student), "GAD, frozen discriminator": measure(frozen.student)}
    print_table(rows)
    print("\nscore of the student minus the teacher's, first to last step against a frozen one")
    for label, scores in (("frozen", frozen.scores), ("best", held_out_scores(frozen.student))):
        gap = score_gap(scores, frozen.student).mean(dim=1)
        print(f"  by the {label} discriminator: {gap[0]:.2f} to {gap[-1]:.2f}")
    plot(seqkd, gad, frozen, arguments.output)
    print(f"figure: {arguments.output}")


if __name__ == "__main__":
    main()
