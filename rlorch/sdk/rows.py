"""Jobs and checkpoints as rows: the dicts, with the field names of the REST API, that the managers return."""

from typing import Any

from rlorch.service.types import Checkpoint, Job


def job_row(job: Job) -> dict[str, Any]:
    """A job."""
    return {
        "name": job.name,
        "state": f"JOB_STATE_{job.state}",
        "statusMessage": job.message,
        "displayName": job.config.display_name,
        "createTime": job.created_s,
        "updateTime": job.updated_s,
        "forwardOnly": job.config.forward_only,
        "trainingShape": job.training_shape_version,
        "step": job.step,
        "trainingConfig": {
            "baseModel": job.config.base_model,
            "loraRank": job.config.max_lora_rank,
            "maxContextLength": job.max_context_length,
            "learningRate": job.config.learning_rate,
            "gradientAccumulationSteps": job.config.gradient_accumulation_steps,
        },
    }


_API_TYPES = {
    "base": "CHECKPOINT_TYPE_INFERENCE_BASE",
    "merged_base": "CHECKPOINT_TYPE_INFERENCE_BASE",
    "delta": "CHECKPOINT_TYPE_INFERENCE_ARC_V2",
    "lora": "CHECKPOINT_TYPE_INFERENCE_LORA",
    "state": "CHECKPOINT_TYPE_TRAINING",
}


def checkpoint_row(checkpoint: Checkpoint) -> dict[str, Any]:
    """A checkpoint."""
    lora_state = checkpoint.kind == "state" and checkpoint.lora_rank > 0
    return {
        "name": checkpoint.resource_name,
        "createTime": checkpoint.created_s,
        "updateTime": checkpoint.created_s,
        "checkpointType": _API_TYPES[checkpoint.kind] + ("_LORA" if lora_state else ""),
        "promotable": checkpoint.promotable,
        "resumable": checkpoint.resumable,
        "step": checkpoint.step,
        "parent": checkpoint.parent,
        "digest": checkpoint.digest,
        "sizeBytes": checkpoint.size_bytes,
        "expireTime": checkpoint.expires_s,
    }
