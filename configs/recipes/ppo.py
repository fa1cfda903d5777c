"""PPO: a clipped ratio, generalised advantage estimates from a critic, KL to the start in the reward.

Paper: Schulman et al. 2017 (1707.06347); advantages: Schulman et al. 2016 (1506.02438, eq. 16); the KL in the reward of
each token is that of RLHF (Ouyang et al. 2022, 2203.02155, section 3.5).
Constants: Clip 0.2 (1707.06347, table 1), values clipped alike (its published code), lambda 0.95, no discount, KL 0.05
(the defaults of public RLHF trainers), advantages whitened, critic 10 times faster than the student.
Guesses: a critic of the student's size that starts from it; 64 questions, 8 answers, 4 updates a round, learning rate
1e-6, 300 updates.
Expected: `rollouts/explained_variance` rises before the rewards do; needs a second trained model in memory.
Before it: `distill-jax import` of questions with gold answers into `questions/`.
Hardware, time: `distill-jax plan configs/recipes/ppo.py --on h200:8` (without the sampling).
"""

from configs.rl import rl
from distill_jax.losses.tokens.policy import ppo_clip
from distill_jax.objective.tokens import TokenTerm
from distill_jax.recipe import Recipe
from distill_jax.rollout.estimators import Gae


def recipe() -> Recipe:
    advantage = Gae(gamma=1.0, lam=0.95, critic="critic", reference="reference", beta=0.05)
    return rl("ppo", TokenTerm(ppo_clip), reference=True, critic=1e-5, advantage=advantage, equal="keep", every=4)
