"""Export: a folder that stock diffusers loads, whose numbers are checked before anyone else trusts them.

    pytorch_lora_weights.safetensors   PEFT keys, alpha folded into B (alpha == rank), adapter metadata beside it
    scheduler/scheduler_config.json    complete; its defaults already give the trained timesteps
    fewstep.json                       steps, timesteps, guidance, method, recipe hash, teacher
    README.md                          model card with a snippet that runs as it stands
    kohya/TITLE.safetensors            on request: keys of ComfyUI and A1111, in a file that may lie beside those of
                                       others; the first one keeps the name that diffusers looks for in a folder

A fully trained student is a whole pipeline under ``pipeline/`` instead of the LoRA file. Several students, each for
a part of the prompts, are a folder ``part_k/`` of this kind each, and a router beside them.
"""

from .card import model_card, snippet
from .load import at_steps, load_exported, stock_call
from .scheduler import student_scheduler
from .verify import ExportError, on_the_whole_base, stock_sample, trainer_sample, verify
from .weights import LORA_FILE, lora_state_dict
from .write import RECORD, check_exportable, export_student, rehearse_export

__all__ = [
    "LORA_FILE",
    "RECORD",
    "ExportError",
    "at_steps",
    "check_exportable",
    "export_student",
    "load_exported",
    "lora_state_dict",
    "model_card",
    "on_the_whole_base",
    "rehearse_export",
    "snippet",
    "stock_call",
    "stock_sample",
    "student_scheduler",
    "trainer_sample",
    "verify",
]
