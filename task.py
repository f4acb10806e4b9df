"""What is known about LunarLander-v3, in one place: picture, actions, mirror, endings, time limit, seeds.

Nothing is imported but gymnasium's registry, so that whoever needs a fact need not load an environment. A policy gets
those facts that concern it as arguments (models.Spaces).
"""

import gymnasium as gym

ENV_ID = "LunarLander-v3"
SPEC = gym.spec(ENV_ID)
SOLVED = SPEC.reward_threshold  # mean return from which the task counts as solved: 200
TIME_LIMIT = SPEC.max_episode_steps  # physics steps: 1,000
VIEWPORT = (400, 600)  # pixels of a rendered frame: height, width
FPS = 50  # physics steps per second of flight

ACTIONS = ("nothing", "left engine", "main engine", "right engine")
MIRRORED_ACTIONS = (0, 3, 2, 1)  # what each action is in a mirror
THRUSTS = ("main engine", "side engine")  # the two numbers, -1 to 1, that are an action with env.continuous
MIRRORED_THRUSTS = (1, -1)  # their signs in a mirror
OUTCOMES = ("rest", "crash", "out_of_sight", "time")  # how an episode ends
LANDED = OUTCOMES.index("rest")

# LunarLander-v3's options, with gymnasium's names and defaults. A policy is told none of them.
CALM = {"gravity": -10.0, "enable_wind": False, "wind_power": 15.0, "turbulence_power": 1.5}

TRAINING_SEEDS = 900_000  # training draws the seeds of its episodes below this
SELECTION_SEED = 900_000  # from here: episodes that choose the best checkpoint
EVALUATION_SEED = 1_000_000  # from here: episodes that score it
