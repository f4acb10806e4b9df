"""A policy as a model that MLflow loads anywhere: frames in, actions out.

This script and the code of policies travel inside the model, so it needs nothing else of this program.

    model = mlflow.pyfunc.load_model("models:/lunar-lander@champion")
    model.predict(frames)                               # uint8 (B, K, H, W) -> greedy actions, int64 (B,)
    model.predict(frames, params={"outputs": "all"})    # -> {"actions", "probabilities", "values"}

K is the number of stacked frames times planes. Actions that are numbers are float32 (B, A), and have standard
deviations, float32 (A,), in the place of probabilities.
"""

import numpy as np
import torch
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel
from safetensors.torch import load_file

from models import POLICIES, Spaces, make_policy


class PolicyModel(PythonModel):
    def load_context(self, context):
        """model_config: `model`, the policy's options, `spaces`, what it sees and does, and `device`, of torch."""
        settings = context.model_config
        options = POLICIES[settings["model"]["name"]].Options.model_validate(settings["model"])
        self.device = torch.device(settings["device"])
        self.policy = make_policy(options, Spaces(**settings["spaces"])).to(self.device).eval()
        self.policy.load_state_dict(load_file(context.artifacts["policy"], device=str(self.device)))

    @torch.no_grad()
    def predict(self, context, model_input: np.ndarray, params=None):
        outputs = (params or {}).get("outputs", "actions")
        if outputs not in ("actions", "all"):
            raise ValueError(f"outputs={outputs!r} must be actions or all")
        frames = torch.from_numpy(np.array(model_input, np.uint8)).to(self.device)
        output = self.policy(*self.policy.preprocess_stacks(frames))
        actions = output.distribution.mode().cpu().numpy()
        if outputs == "actions":
            return actions
        if self.policy.spaces.continuous:
            spread = {"deviations": output.distribution.log_std.exp().cpu().numpy()}
        else:
            spread = {"probabilities": output.distribution.probs.float().cpu().numpy()}
        return {"actions": actions} | spread | {"values": output.value.float().cpu().numpy()}


set_model(PolicyModel())
