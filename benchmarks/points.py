"""What a policy's points are lost to: the return of LunarLander-v3 taken apart, by how the episode ended.

    python benchmarks/points.py results/cnn [--episodes 1000] [--seed 1000000] [env.enable_wind=true]

LunarLander-v3 pays the change of a potential: minus 100 for each unit of distance from the pad, of speed and of tilt,
plus 10 for each leg on the ground. It takes the fuel, and ends with 100 for rest and -100 for a crash. So a return is
the sum of the columns of the table, exactly: what the start was worth, the bonus at the end, the legs, and what was
spent or left lacking: fuel, distance, speed and tilt. Greedy episodes on seeds that no training saw.
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from gymnasium.envs.box2d.lunar_lander import FPS, LEG_DOWN, SCALE, VIEWPORT_H, VIEWPORT_W

from evaluate import in_weather, play, whole
from lander import Lander
from machinery.checkpoint import load_policy
from machinery.errors import UserError, one_line
from task import ENV_ID, EVALUATION_SEED, OUTCOMES

COLUMNS = ("start", "bonus", "legs", "fuel", "distance", "speed", "tilt")
GOOD = 250  # a return below it has lost something


def potential(lander):
    """(legs, distance, speed, tilt), points: the parts of the potential of LunarLander.step, whose sum it is."""
    (x, y), (speed_x, speed_y) = lander.lander.position, lander.lander.linearVelocity
    width, height = VIEWPORT_W / SCALE / 2, VIEWPORT_H / SCALE / 2
    return (
        10 * sum(leg.ground_contact for leg in lander.legs),
        -100 * math.hypot((x - width) / width, (y - lander.helipad_y - LEG_DOWN / SCALE) / height),
        -100 * math.hypot(speed_x * width / FPS, speed_y * height / FPS), -100 * abs(lander.lander.angle))


class Accounted(Lander):
    """Keeps the potential of the first, the last but one, and the last physics step."""

    def reset(self, seed):
        self.potentials = []
        return super().reset(seed)

    def pass_time(self):
        super().pass_time()
        self.potentials = [*self.potentials[:1], *self.potentials[1:][-1:], potential(self.lander)]

    def account(self):
        """(points by COLUMNS, their sum) of the episode that just ended."""
        # The step that ends an episode pays the bonus in place of everything else.
        last = self.potentials[-2 if self.terminated else -1]
        legs, distance, speed, tilt = last
        bonus = 0 if not self.terminated else 100 if OUTCOMES[self.outcome()] == "rest" else -100
        start = -sum(self.potentials[0])
        fuel = self.episode_return - (start + bonus + sum(last))  # what is left
        return start, bonus, legs, fuel, distance, speed, tilt


class Accounts:
    """A recorder of evaluate.play that keeps {index of the episode: its account}."""

    def __init__(self):
        self.rows = {}

    def begin(self, index, env):
        pass

    def decide(self, index, *_):
        pass

    def end(self, index, env):
        self.rows[index] = env.account()


def fly(policy, env_config, seeds):
    """(returns (N,), outcomes (N,), accounts (N, columns)) of greedy episodes."""
    accounts = Accounts()
    returns, _, outcomes = play(
        policy, env_config, seeds, recorder=accounts,
        make_env=lambda env_id, rendered, **settings: Accounted(**settings))
    return returns, outcomes, np.array([accounts.rows[index] for index in range(len(seeds))])


def table(returns, outcomes, accounts):
    """Markdown: a row for each kind of end, landings below GOOD apart. The last column: what the mean would gain if
    these had ended as well as the good ones.
    """
    landed = outcomes == OUTCOMES.index("rest")
    kinds = {f"landed, {GOOD} or more": landed & (returns >= GOOD), f"landed, below {GOOD}": landed & (returns < GOOD)}
    kinds |= {name.replace("_", " "): outcomes == i for i, name in enumerate(OUTCOMES) if name != "rest"}
    best = returns[next(rows for rows in kinds.values() if rows.any())].mean()
    lines = [f"| ended | episodes | return | {' | '.join(COLUMNS)} | costs the mean |",
             "| --- " * (4 + len(COLUMNS)) + "|"]
    for name, rows in {**kinds, "all": np.ones(len(returns), bool)}.items():
        if rows.any():
            parts = " | ".join(f"{value:.1f}" for value in accounts[rows].mean(0))
            cost = (best - returns[rows]).sum() / len(returns)
            lines.append(f"| {name} | {rows.mean():.1%} | {returns[rows].mean():.0f} | {parts} | {cost:.1f} |")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="runs/NAME, results/NAME or a .safetensors file")
    parser.add_argument("--episodes", type=whole(1, 10**6), default=1000)
    parser.add_argument("--seed", type=whole(0, 2**31 - 1), default=EVALUATION_SEED, help="of the first episode")
    parser.add_argument("overrides", nargs="*", metavar="env.key=value", help="another weather")
    args = parser.parse_intermixed_args(argv)
    with one_line("points.py"):
        policy, config, _ = load_policy(args.checkpoint)
        if config.env.id != ENV_ID:
            raise UserError(f"{args.checkpoint}: a policy of {config.env.id}, whose rewards have other parts")
        config = in_weather(config, args.overrides)
        returns, outcomes, accounts = fly(policy, config.env, range(args.seed, args.seed + args.episodes))
        print(f"{args.checkpoint}: mean {returns.mean():.1f} of {len(returns)} episodes\n\n"
              f"{table(returns, outcomes, accounts)}")


if __name__ == "__main__":
    main()
