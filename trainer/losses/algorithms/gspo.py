"""Group sequence policy optimization: one ratio for a whole sequence."""

from __future__ import annotations

import torch

from trainer.losses.algorithms.ppo import clipped_surrogate
from trainer.losses.registry import PolicyLoss, Window, register
from trainer.losses.token import TokenLoss, clip_window, require_same_shape


def gspo(
    logprobs_T: torch.Tensor,
    old_logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    sequence_T: torch.Tensor,
    mask_T: torch.Tensor,
    num_sequences: int,
    clip_low: float,
    clip_high: float,
) -> TokenLoss:
    """Compute GSPO-token (arXiv 2507.18071): the variant of GSPO in which every token has an advantage of its own.

    For sequence i with n_i action tokens t (sequence_T[t] = i):

        s_i  = exp(1/n_i sum_t log(pi_theta / pi_old)_t)             geometric mean of the tokens' ratios
        s_it = sg[s_i] pi_theta,t / sg[pi_theta,t]                   equal to s_i
        l_t  = -min(s_it A_t, clip(s_it, 1 - clip_low, 1 + clip_high) A_t)
        dl_t/dlog pi_t = -s_i A_t, or 0 where the clip acted (as in `ppo`)

    With one advantage for the whole sequence the gradient of sum_t l_t / n_i is that of GSPO. The paper's clips are
    3e-4 and 4e-4: s_i is a mean over hundreds of tokens and stays near 1.

    The sequence here is the *sub-trace*: the mean is over one forward pass, not over the episode. This is the only loss
    that depends on where an episode was cut.

    Tensors [T]: mask_T True = action token; sequence_T int64 in [0, num_sequences), also for masked tokens. Tokens with
    mask_T False are in no mean; a sequence without action tokens has s_i = 1. `ratio_T` is s_i. The mean is computed in
    float64. s_i beyond the float's range: see `ppo`.

    ValueError: shapes differ; a sequence number out of range; a negative clip.
    """
    require_same_shape(
        logprobs=logprobs_T, old_logprobs=old_logprobs_T, advantages=advantages_T, sequence=sequence_T, mask=mask_T
    )
    if sequence_T.numel() and not 0 <= int(sequence_T.min()) <= int(sequence_T.max()) < num_sequences:
        raise ValueError(
            f"sequence numbers from {int(sequence_T.min())} to {int(sequence_T.max())} "
            f"with num_sequences={num_sequences}: must lie in [0, num_sequences)"
        )
    fixed_T = logprobs_T.detach()
    log_ratio_T = torch.where(mask_T, fixed_T - old_logprobs_T, 0.0).double()
    zero_S = torch.zeros(num_sequences, dtype=torch.float64, device=logprobs_T.device)
    total_S = zero_S.index_add(0, sequence_T, log_ratio_T)
    count_S = zero_S.index_add(0, sequence_T, mask_T.double())
    log_s_T = (total_S / count_S.clamp(min=1.0))[sequence_T].to(logprobs_T.dtype)
    return clipped_surrogate(log_s_T + (logprobs_T - fixed_T), advantages_T, *clip_window(clip_low, clip_high))


register(
    PolicyLoss(
        name="gspo",
        function=gspo,
        reads=("old_logprobs", "advantages"),
        ratio="s = (prod pi_theta / pi_old)^(1/n) over the n action tokens of the sub-trace",
        formula="as ppo, with s in place of r",
        source="arXiv 2507.18071",
        windows=(Window("3e-4", "4e-4", "narrow: s is a mean over hundreds of tokens and stays near 1"),),
        by_sequence=True,
    )
)
