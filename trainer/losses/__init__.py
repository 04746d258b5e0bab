"""Per-token losses, one algorithm per file (algorithms/). They reduce nothing: a worker weights, sums and divides them.

    L = 1/N sum_i [ w_i ( c_i l_i + kl_coef KL_i - entropy_coef H_i ) + u_i nll_i ]

over the action tokens i of the optimizer step; N is their number over all ranks and micro-batches. Prompts, tool output
and copied context are in no sum. A token masked by a loss or a correction adds 0 and counts in N.

    l_i    policy loss        algorithms/: ppo, decoupled, dis, cispo, gspo; on-policy all have the gradient -A
    c_i    engine mismatch    correction.py: none, tis, icepop, mis
    KL_i   to a reference     kl.py: k1, k2, k3; as a loss here, or as a reward on the driver
    w_i    unit of the mean   averages.py: tokens, episodes or sub-traces
    u_i    positive examples  averages.py

`value` (value.py) is the critic's l, `nll` the supervised l, and `distill` the l of a teacher: same sum, same N.

With w_i of `token` or `episode`, L does not depend on micro-batches, ranks, the order of tokens, or where an episode
was cut; with `sub_trace`, or with gspo as l, the cut matters.

Shapes: [T], one number per token, float32 or float64 in and out. Advantages A and all log-probabilities except those of
pi_theta are constants. Each docstring states the results at and beyond the range of a float; `require_finite` refuses
any that are not finite.
"""

from trainer.losses.algorithms.cispo import cispo
from trainer.losses.algorithms.decoupled import decoupled
from trainer.losses.algorithms.dis import dis
from trainer.losses.algorithms.gspo import gspo
from trainer.losses.algorithms.ppo import ppo
from trainer.losses.averages import normalizer_weights, positive_weights
from trainer.losses.correction import correction_weights
from trainer.losses.distill import Divergence, distill, distill_advantages, with_tail
from trainer.losses.kl import kl, kl_reward
from trainer.losses.registry import policy_loss
from trainer.losses.token import TokenLoss, nll, require_finite
from trainer.losses.value import ValueLoss, value

__all__ = [
    "Divergence",
    "TokenLoss",
    "ValueLoss",
    "cispo",
    "correction_weights",
    "decoupled",
    "dis",
    "distill",
    "distill_advantages",
    "gspo",
    "kl",
    "kl_reward",
    "nll",
    "normalizer_weights",
    "policy_loss",
    "positive_weights",
    "ppo",
    "require_finite",
    "value",
    "with_tail",
]
