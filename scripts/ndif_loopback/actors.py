"""NDIF's model actor and controller, adapted to a CPU and to models in local folders.

The actor replaces the two methods that need CUDA. The controller reads a model's size from its
folder. NDIF imports both by name (`NDIF_MODEL_IMPORT_PATH`, `NDIF_CONTROLLER_IMPORT_PATH`). Blocks
run in forks of one process (`forking`). All else is NDIF as published.
"""

import gc
import json
from pathlib import Path

import forking
import ray
from ndif.services.ray.deployments.controller.controller import _ControllerActor
from ndif.services.ray.sandbox import host
from ndif.services.ray.sandbox.model import SandboxModelDeployment
from nnsight.modeling.huggingface import HuggingFaceModel
from nnsight.modeling.mixins.remotable import CheckpointInfo, Remotable
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

host.spawn = forking.spawn
MODEL_BYTES = 700_000_000
"""The least that a model counts. Each takes 0.5 GB here, however small it is: of the 8 GB that
`start.sh` gives the server, eleven are there at once, and the one that waits longest makes room."""


class OnCPU(SandboxModelDeployment):
    """NDIF's model actor on a CPU.

    As in NDIF, a trusted user's block runs in the process that holds the weights, any other block
    in a process of its own without them.
    """

    CACHEABLE = False

    def load_from_disk(self):
        # Inputs come encoded, so no processor is used. Many need torchvision, which is not installed
        # here: their parts stand for them.
        folder = json.loads(self.model_key.partition(":")[2])["repo_id"]
        tokenizer = AutoTokenizer.from_pretrained(folder)
        parts = {"tokenizer": tokenizer, "image_processor": AutoImageProcessor.from_pretrained(folder)}
        model = HuggingFaceModel.from_model_key(
            self.model_key,
            dispatch=True,
            dtype=self.dtype_name,
            device="cpu",
            processor=tokenizer,
            **parts,
            **self.kwargs,
        )
        model._module.requires_grad_(False)
        return model

    def cleanup(self):
        self.discard_sandbox()
        self.kill_switch.clear()
        self.kill_reason = self.execution_ident = None
        self.model.interleaver.cancel()
        gc.collect()


Actor = ray.remote(num_cpus=0, max_restarts=-1)(OnCPU)


def describe_folder(cls, model_key, dtype, trust_remote_code=False):
    """Size, configuration and revision of a model in a folder, in place of a request to the hub.

    Raises:
        FileNotFoundError: when the folder holds no .safetensors file.
    """
    key = json.loads(model_key.partition(":")[2])
    folder = Path(key["repo_id"])
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise FileNotFoundError(f"There is no model {key['repo_id']!r} here.")
    return CheckpointInfo(
        size_bytes=max(MODEL_BYTES, sum(file.stat().st_size for file in weights)),
        config=AutoConfig.from_pretrained(folder),
        revision=key.get("revision"),
    )


@ray.remote(num_cpus=1, num_gpus=0, max_restarts=-1, resources={"head": 1})
class Controller(_ControllerActor):
    """NDIF's controller, which asks `describe_folder` about models."""

    def __init__(self, *args, **kwargs):
        # ndif 0.1.2 passes an argument that nnsight 0.8.1 no longer takes.
        Remotable.describe_checkpoint = classmethod(describe_folder)
        Remotable.max_tp_size = classmethod(lambda cls, model_key, trust_remote_code=False: None)
        _ControllerActor.__init__(self, *args, **kwargs)
