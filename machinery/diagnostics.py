"""Tells in words what the curves of a run that goes wrong would show, with the settings that usually matter.

    diagnostics = Diagnostics(config)
    for sentence in diagnostics.watch(metrics): print(sentence)     # metrics: as logged, once per update

Each is said once, and only if it lasts: a run that learns leaves the bands for a few updates, too.
tests/test_diagnostics.py makes each happen, and holds all of them silent on the runs in results/.
"""

import math
from collections import Counter

# Rules of thumb, which plot.py draws, too; docs/curves.md says what they are good for.
CLIP_FRACTION_BAND, KL_BAND = (0.1, 0.2), (0.0, 0.3)
LONG = 15  # updates in a row
HIGH_CLIP = 1.5 * CLIP_FRACTION_BAND[1]  # a healthy run is just above the band while it learns fastest
LOW_CLIP = 0.2 * CLIP_FRACTION_BAND[0]  # and below it as it converges
LOW_ENTROPY = 0.15  # of the entropy when all actions are alike likely


class Diagnostics:
    def __init__(self, config):
        self.config, self.task, self.streaks, self.said = config, config.env.task, Counter(), set()

    def watch(self, metrics):
        """The sentences that this update's metrics give reason to, mostly none; nan counts as no trouble."""
        sentences = []
        for name, (wrong, sentence) in self._signs(metrics).items():
            self.streaks[name] = self.streaks[name] + 1 if wrong else 0
            if self.streaks[name] >= LONG and name not in self.said:
                self.said.add(name)
                sentences.append(f"{sentence} ({LONG} updates in a row)")
        return sentences

    def _signs(self, metrics):
        """{name: (whether this update shows it, what to say)}"""
        ppo, env, task = self.config.ppo, self.config.env, self.task
        clip, kl, entropy = (metrics[f"update/{key}"] for key in ("clip_fraction", "approx_kl", "entropy"))
        returns = metrics["rollout/return_mean"]
        unsolved = task.solved is None or returns < task.solved
        full_steps = metrics["schedule/learning_rate"] > 0.5 * ppo.learning_rate  # not warming up, nor at the end
        return {
            "high clip fraction": (
                clip > HIGH_CLIP,
                f"clip fraction is {clip:.2f}, above its band of {CLIP_FRACTION_BAND[0]} to {CLIP_FRACTION_BAND[1]}: "
                "a decision outside the clip range gives no gradient any more. Lower "
                f"ppo.learning_rate={ppo.learning_rate:g} or ppo.update_epochs={ppo.update_epochs}, or use larger "
                "minibatches with a smaller "
                f"ppo.num_minibatches={ppo.num_minibatches}"),
            "low clip fraction": (
                clip < LOW_CLIP and full_steps and unsolved,
                f"clip fraction is {clip:.3f}, far below its band of {CLIP_FRACTION_BAND[0]} to "
                f"{CLIP_FRACTION_BAND[1]}, and the return is {returns:.0f}: the policy hardly moves. Raise "
                f"ppo.learning_rate={ppo.learning_rate:g}, ppo.update_epochs={ppo.update_epochs} or "
                f"ppo.num_minibatches={ppo.num_minibatches}"),
            "high KL": (
                kl > KL_BAND[1],
                f"KL divergence is {kl:.2f}, above {KL_BAND[1]}: updates go too far. Lower "
                f"ppo.learning_rate={ppo.learning_rate:g}, set ppo.target_kl (now {ppo.target_kl}), or lower "
                f"ppo.update_epochs={ppo.update_epochs}"),
            "low entropy": (
                not task.continuous and entropy < LOW_ENTROPY * math.log(len(task.actions)) and unsolved,
                f"entropy has fallen to {entropy:.2f} nats at a return of {returns:.0f}: the policy has stopped "
                f"trying. Raise ppo.entropy_coef={ppo.entropy_coef:g}, lower ppo.learning_rate={ppo.learning_rate:g} "
                f"or ppo.update_epochs={ppo.update_epochs}"),
            "negative explained variance": (
                metrics["update/explained_variance"] < 0,
                f"explained variance is {metrics['update/explained_variance']:.2f}: the value function is worse than "
                f"a constant, and advantages are noise. Raise ppo.value_coef={ppo.value_coef:g}, bring "
                f"ppo.reward_scale={ppo.reward_scale:g} to where returns are about 1, or lower "
                f"ppo.learning_rate={ppo.learning_rate:g}"),
            "time-outs": (
                task.landed is not None and metrics["rollout/length_mean"] > 0.9 * task.time_limit,
                f"episodes last {metrics['rollout/length_mean']:.0f} of at most {task.time_limit} steps, so nearly all "
                f"time out: the policy hovers rather than lands. Raise ppo.gamma={ppo.gamma:g}, so that it sees the "
                f"reward for landing from afar, ppo.entropy_coef={ppo.entropy_coef:g}, so that it finds it, or "
                f"env.frame_skip={env.frame_skip}, which brings it nearer"),
        }
