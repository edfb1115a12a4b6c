"""The discriminator's loss: a teacher response should score above the rollouts of its prompt."""

from torch import Tensor
from torch.nn.functional import softplus


def bradley_terry_loss(teacher_scores: Tensor, student_scores: Tensor) -> Tensor:
    """Loss of every pair of a rollout with the teacher's response to the same prompt.

    `softplus(s - t)` is `-log sigmoid(t - s)` without its overflow; its gradient is
    sigmoid(s - t) on the student's score and the opposite on the teacher's.

    Args:
        teacher_scores: Float [B], one for each prompt.
        student_scores: Float [B, G].

    Returns:
        Float [B, G]; the mean over all pairs of a step is the discriminator's loss. The caller
        divides by the pairs of the whole step, so that micro-batches do not change it.

    Source: paper Eq. 3 and appendix A.1.
    """
    return softplus(student_scores - teacher_scores.unsqueeze(1))
