"""LoRA files of tiny pipelines, written by diffusers itself."""

import torch


def write_lora(folder, pipe, targets, seed=0, rank=2):
    """A random LoRA of a stock pipeline, which is left with it.

    Args:
        targets: part of the pipeline -> names of its layers.

    Returns:
        The file.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.utils import get_peft_model_state_dict

    layers = {}
    generator = torch.Generator().manual_seed(seed)
    for part, names in targets.items():
        module = getattr(pipe, part)
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=names), module)
        for name, weight in module.named_parameters():
            if ".lora_" in name:
                weight.data = 0.3 * torch.randn(weight.shape, generator=generator)
        layers[f"{part}_lora_layers"] = get_peft_model_state_dict(module)
    type(pipe).save_lora_weights(folder, **layers)
    return folder / "pytorch_lora_weights.safetensors"
