"""Overlap of the student's text with the teacher's: a diagnostic, not a measure of quality."""

from collections.abc import Sequence

from rouge_score.rouge_scorer import RougeScorer


def rouge_l(candidates: Sequence[str], references: Sequence[str]) -> float:
    """Mean ROUGE-L F of candidates against references, stemmed, in [0, 1].

    A distilled student can have a lower value than an imitating one and be better: it does not
    track quality (paper section 4, Figure 4).

    Source: Lin 2004; the training-time diagnostic of the official code.
    """
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = zip(candidates, references, strict=True)
    scores = [
        scorer.score(reference, candidate)["rougeL"].fmeasure for candidate, reference in pairs
    ]
    return sum(scores) / len(scores)
