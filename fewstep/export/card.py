"""The model card, and the code in it that samples the student with stock diffusers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from ..shape import Shape
from ..teachers.origin import RECORD
from ..teachers.pipelines import EDITING
from . import comfyui
from .weights import LORA_FILE, adapters

UNPROMPTED = "DDPMPipeline"  # hands on no labels
EDM = "EDMPipeline"  # which is fewstep's
IMAGE_FIRST = ("Flux2Pipeline", "Flux2KleinPipeline")  # whose calls begin with an image
ENCODED = {"pooled": "encoded[0]", "embeds": "encoded[0].mean(0)", "label": "torch.tensor([prompt])"}
# A program for each kind of export, of parts that some share; the words in braces are those of `_words`.
ADAPTED = """\
{imports}from diffusers import {loader}, {scheduler}
{resolve}{load_file}
pipe = {loader}.{load}({teacher}{options}{without})
{merged}{adapters}
pipe.scheduler = {scheduler}.from_pretrained({folder!r}, subfolder='scheduler')
{extras}"""
WHOLE = """\
{imports}from diffusers import DiffusionPipeline
{load_file}
pipe = DiffusionPipeline.from_pretrained({pipeline!r}{without})
{extras}"""
IMAGE = """\
image = pipe({prompt}, {call}).images[0]
image.save('image.png')"""
TOKENS = """\
from fewstep.tokens.pipeline import {pipeline_class}

pipe = {pipeline_class}.from_pretrained({pipeline!r})
"""
OURS = """\
{imports}from fewstep.teachers.edm.pipeline import {pipeline_class}
{load_file}
pipe = {pipeline_class}.from_pretrained({pipeline!r})
{extras}"""
MERGED = """\
loras = {loras}
for k, lora in enumerate(loras):  # merged into the teacher, as before it was distilled
    place, name = os.path.split(lora['path'])
    pipe.load_lora_weights(place, weight_name=name, adapter_name=f'teacher_{{k}}')
pipe.set_adapters([f'teacher_{{k}}' for k in range(len(loras))], [lora['weight'] for lora in loras])
pipe.fuse_lora(components=list(pipe.get_list_adapters()))
pipe.unload_lora_weights()
"""
EXPERTS = """
experts = {experts}  # of each step
def use(step):  # the expert of a step; other adapters stay as they are
    others = [name for name in pipe.get_active_adapters() if name not in experts]
    pipe.{network}.set_adapter([experts[step % len(experts)], *others])  # with the weights they have

def switch(pipe, step, time, kwargs):
    use(step + 1)
    return kwargs

use(0)  # once more after loading another adapter
"""
FOLLOWING = """
experts = {{{first!r}: pipe.{network}.forward}}
for name in {others}:  # a network each, that moves where the pipeline is moved
    expert = type(pipe.{network}).from_pretrained(f'{folder}/{{name}}', torch_dtype=pipe.{network}.dtype)
    expert.to(pipe.device)
    pipe.{network}.add_module(name, expert)
    experts[name] = expert.forward
steps = cycle({experts})  # of each call of the network; anew after a call that was interrupted
pipe.{network}.forward = lambda *args, **options: experts[next(steps)](*args, **options)
"""
CHOSEN = """
others = [name for name in pipe.get_active_adapters() if name not in {parts}]  # stay as they are
pipe.{network}.set_adapter([route(prompt), *others])
"""
NETWORKS = """\
networks = {{}}
for part in {parts}:
    networks[part] = type(pipe.{network}).from_pretrained(
        f'{folder}/{{part}}/pipeline', subfolder={network!r}, torch_dtype=pipe.{network}.dtype
    ).to(pipe.device)
"""
ENCODING = """\
with open({record!r}) as file:
    options = json.load(file)["encoding"]
place = options.pop("at")
"""
ENCODE = "encoded = pipe.encode_prompt(prompt, device=pipe.device, **options)[place]\n    "
# Finds the part of a prompt in the tree of fewstep.methods.router.Router, by what it was fitted on.
ROUTE = """
with open({tree!r}) as file:
    children = json.load(file)["children"]
{encoding}router = load_file({tensors!r})

def route(prompt):
    {encode}sides = router["directions"] @ {encoded}.double().cpu() > router["thresholds"]
    node = 0
    while node >= 0:  # to the half of the prompts on this side, and so on down to one part
        node = children[node][int(sides[node])]
    return {parts}[-node - 1]

prompt = {asked}
"""
ROUTED_ADAPTED = "import json\n\n" + ADAPTED + ROUTE + CHOSEN + IMAGE
ROUTED = NETWORKS + ROUTE + "pipe.{network} = networks[route(prompt)]\n" + IMAGE
FIXED = """
noise = torch.randn(1, *{latent_shape}, generator=torch.Generator().manual_seed(0)){given}
generator = torch.Generator().manual_seed(0)  # every step adds the first noise again
def again(pipe, step, time, kwargs):
    generator.manual_seed(0)
    return kwargs

"""
RESOLVE = "from fewstep.teachers import resolve  # only for the folder of the built-in teacher\n"
LABELLED = "pipe.unet.forward = partial(pipe.unet.forward, class_labels=torch.tensor([{label}]))\n"


def snippet(record: Mapping[str, Any], folder: str = ".") -> str:
    """Code that samples the student with stock diffusers, as it stands."""
    return _program(record).format(**_words(record, folder))


def _program(record: Mapping[str, Any]) -> str:
    lora = record["kind"] == "lora"
    if "student" in record:  # of tokens
        return TOKENS + IMAGE
    if "parts" in record and lora:
        return ROUTED_ADAPTED
    if "experts" in record and lora:
        return ADAPTED + EXPERTS + IMAGE
    if lora:
        return ADAPTED + IMAGE
    loaded = OURS if record["pipeline_class"] == EDM else WHOLE
    return "import json\n\n" + loaded + ROUTED if "parts" in record else loaded + IMAGE


def _words(record: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """What stands in the braces of the programs."""
    prompt, parts = _prompt(record), record.get("parts", [])
    loaded = "from diffusers.utils import load_image\n" if record["pipeline_class"] in EDITING else ""
    named = "prompt=" if record["pipeline_class"] in IMAGE_FIRST else ""
    return {
        **record,
        **_extras(record, folder),
        **_base(record, folder),
        "folder": folder,
        "pipeline": os.path.join(folder, *parts[:1], "pipeline"),
        "without": "".join(f", {name}=None" for name in record.get("absent", [])),
        "adapters": "\n".join(_load(name, folder) for name in adapters(record)),
        "load_file": "from safetensors.torch import load_file\n" if parts else loaded,
        "tree": os.path.join(folder, "router.json"),
        "tensors": os.path.join(folder, "router.safetensors"),
        "encoded": ENCODED.get(record.get("routed_on", "")),
        **_encoding(record, folder),
        "asked": _label(record) if record.get("routed_on") == "label" else prompt,
        "prompt": named + (_asked(record) if parts else prompt),
    }


def _asked(record: Mapping[str, Any]) -> str:
    return "[prompt]" if record.get("routed_on") == "label" else "prompt"


def _encoding(record: Mapping[str, Any], folder: str) -> dict[str, str]:
    """Of a program that routes: how a prompt is encoded; a label is a number as it is."""
    if record.get("routed_on") == "label":
        return {"encoding": "", "encode": ""}
    return {"encoding": ENCODING.format(record=os.path.join(folder, "fewstep.json")), "encode": ENCODE}


def encoding_of(record: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """Of what prompts are routed on: its place in what ``encode_prompt`` gives, and what that is told beside them."""
    before = {"at": 2 if record.get("routed_on") == "pooled" else 0, "num_images_per_prompt": 1}
    options = dict(record.get("encoding", {**before, "do_classifier_free_guidance": False}))
    return options.pop("at"), options


def _base(record: Mapping[str, Any], folder: str) -> dict[str, str]:
    """How the teacher is loaded: from a folder, the hub or a file, with its variant, and its LoRAs merged."""
    weights, builtin = record.get(RECORD, {}), str(record["teacher"]).startswith("builtin:")

    def told(value: Any, *keys: str) -> str:
        """What lies on the machine that trained is told to nobody who is given the card."""
        if not _local(value):
            return repr(value)
        return "".join(
            [f"json.load(open({os.path.join(folder, 'fewstep.json')!r}))", *(f"[{k!r}]" for k in keys)]
        )

    teacher, config = told(record["teacher"], "teacher"), told(weights.get("config"), RECORD, "config")
    single = str(record["teacher"]).endswith(".safetensors")
    options = f", config={config}" if single else ""
    options += f", variant={weights['variant']!r}" if "variant" in weights else ""
    for name, kind in record.get("teacher_parts", {}).items():
        options += f", {name}={kind}.from_pretrained({config}, subfolder={name!r})"
    loras = told(weights.get("loras"), RECORD, "loras")
    return {
        "teacher": f"resolve({teacher})" if builtin else teacher,
        "resolve": RESOLVE if builtin else "",
        "loader": record["pipeline_class"] if single else "DiffusionPipeline",
        "load": "from_single_file" if single else "from_pretrained",
        "options": options,
        "merged": MERGED.format(loras=loras) if "loras" in weights else "",
    }


def _extras(record: Mapping[str, Any], folder: str) -> dict[str, str]:
    """Imports, lines before the call and arguments of the call that not all programs have."""
    imports, lines, experts = "", "", list(record.get("experts", ()))
    call = [f"{name}={value!r}" for name, value in record["call"].items()]
    if experts and record["kind"] == "lora":
        call.append("callback_on_step_end=switch")
    elif experts:
        first, *others = dict.fromkeys(experts)
        imports = "from itertools import cycle\n\n"
        lines = FOLLOWING.format(**record, first=first, others=others, folder=folder)
    if record.get("noise") == "fixed":
        imports, lines = (
            imports + "import torch\n",
            lines + FIXED.format(latent_shape=record["latent_shape"], given=_given(record)),
        )
        call.append("latents=noise, generator=generator, callback_on_step_end=again")
    if record["pipeline_class"] == UNPROMPTED and "num_classes" in record:
        imports, lines = (
            "from functools import partial\n" + (imports or "\n") + "import torch\n",
            lines + LABELLED.format(label=_label(record)),
        )
    if record.get("routed_on") == "label":
        imports += "import torch\n"
    if record["kind"] == "lora":
        imports = _imports(record) + imports
    return {"imports": imports, "extras": lines, "call": ", ".join(call)}


def _given(record: Mapping[str, Any]) -> str:
    """What makes the call's latents of what the pipeline holds, as Python has it; see :func:`.load.given`."""
    return f".mT.reshape(1, *{record['given_shape']})" if "given_shape" in record else ""


def _imports(record: Mapping[str, Any]) -> str:
    """What loading the teacher takes beside diffusers' loader."""
    needs = {"json": _lies_here(record) and "parts" not in record, "os": "loras" in record.get(RECORD, {})}
    lines = [f"import {name}\n" for name, needed in needs.items() if needed]
    parts = sorted({*record.get("teacher_parts", {}).values()})
    text = "".join(lines) + ("\n" if lines else "")
    if own := [kind for kind in parts if kind.startswith("Autoencoder")]:
        text += f"from diffusers import {', '.join(own)}\n"
    if other := [kind for kind in parts if kind not in own]:
        text += f"from transformers import {', '.join(other)}\n"
    return text


def _lies_here(record: Mapping[str, Any]) -> bool:
    """Whether the teacher, or something of it, is on the machine that trained, rather than of the hub or built in."""
    weights = record.get(RECORD, {})
    return any(map(_local, (record["teacher"], weights.get("config"), weights.get("loras"))))


def _local(value: Any) -> bool:
    """Of a path, or of LoRAs."""
    if isinstance(value, list):
        return any(_local(one["path"]) for one in value)
    return os.path.isabs(str(value))


def _load(name: str, folder: str) -> str:
    where = os.path.join(folder, name) if name else folder
    adapter = f", adapter_name={name!r}" if name else ""
    return f"pipe.load_lora_weights({where!r}, weight_name={LORA_FILE!r}{adapter})"


def _prompt(record: Mapping[str, Any]) -> str:
    """What the call is given to draw, as Python has it."""
    if record["pipeline_class"] == UNPROMPTED:
        return "batch_size=1"
    if "num_classes" in record:
        return f"[{_label(record)}]"
    if record["pipeline_class"] in EDITING:
        return f"image=[load_image('reference.png')], prompt={record.get('prompt', 'make it red')!r}"
    return repr(record.get("prompt", "207" if "student" in record else "a photo of a cat"))


def _label(record: Mapping[str, Any]) -> str:
    prompt = str(record.get("prompt", "0"))
    return prompt if prompt.isdecimal() else f"pipe.labels[{prompt!r}]"


def _task(record: Mapping[str, Any]) -> str:
    """The hub's name for what the pipeline does; it has none for class labels."""
    if record["pipeline_class"] in EDITING:
        return "image-to-image"
    unprompted = record["pipeline_class"] == UNPROMPTED or "num_classes" in record
    return "unconditional-image-generation" if unprompted else "text-to-image"


def _about_sampling(record: Mapping[str, Any]) -> list[str]:
    """Guidance, times, and what happens at other numbers of steps."""
    taught, told = record.get("guidance_scale", 1.0), record["call"].get("guidance_scale", 0.0)
    if "released" in record:
        about = ["No guidance at sampling: the teacher's is distilled in."]
    elif told > 1:
        about = [f"It is told its guidance scale, {told}; there is no further guidance at sampling."]
    else:
        about = [f"No guidance at sampling (the teacher's, {taught}, is distilled in)."]
    if "scheduler" not in record:
        return about
    about.append(
        f"Trained timesteps {_short(record['timesteps'])}. {_where_times_are(record)} The scheduler's configuration is "
        f"complete: load it with `{record['scheduler']}.from_pretrained`, not with `from_config` of another scheduler."
    )
    for steps, one in record.get("steps", {}).items():
        if one["call"] != record["call"]:
            call = ", ".join(f"{name}={value!r}" for name, value in one["call"].items())
            about.append(
                f"With {steps} {_plural(int(steps))}, which it was trained for too: `pipe(..., {call})`."
            )
    if "shapes" in record:
        about.append(
            f"Trained at {_sizes(record['shapes'])} pixels; `height=` and `width=` of the call choose."
        )
    return [*about, "", _about_more(record)]


def _sizes(shapes: list[Any]) -> str:
    """Height by width."""
    *others, last = [str(Shape.of(one)).replace("x", " x ") for one in shapes]
    return f"{', '.join(others)} and {last}" if others else last


def _where_times_are(record: Mapping[str, Any]) -> str:
    """Whether a call with the number of steps, and no more, has the trained times."""
    odd = [
        name
        for name in ("timesteps", "sigmas", "intermediate_timesteps")
        if record["call"].get(name) is not None
    ]
    if odd:
        return (
            f"The stock pipeline has no grid of them: its call has to be told them as `{odd[0]}=`, as above."
        )
    return f"`num_inference_steps={record['num_steps']}` alone gives them."


def _about_more(record: Mapping[str, Any]) -> str:
    """What happens with more steps than it was trained for, and how."""
    steps, more = record["num_steps"], record.get("more_steps")
    if "experts" in record or record.get("noise") == "fixed":
        return f"It runs at its {steps} {_plural(steps)} only."
    if not more:
        return "Other numbers of steps are other times, at which it was not trained; look before you rely on them."
    how = f"`num_inference_steps={more['steps']}` calls it"
    if more["scheduler"]:
        options = ", ".join(f"{name}={value!r}" for name, value in more["scheduler"].items())
        how = (
            f"More than {steps} {_plural(steps)} its scheduler refuses, unless it is loaded by "
            f"`{record['scheduler']}.from_pretrained(..., {options})`; {how} then"
        )
    return (
        f"{how} at {_short(more['timesteps'])}. It was not trained at the times between its own: 5 to 8 steps may look "
        "smoother or worse, so look before you rely on them."
    )


def _short(times: list[float]) -> list[float]:
    return [round(t, 4) for t in times]


def _plural(steps: int) -> str:
    return "step" if steps == 1 else "steps"


def _made(record: Mapping[str, Any], teacher: str) -> str:
    steps, fewstep = record["num_steps"], f"fewstep {record['fewstep']}"
    if "released" in record:
        return (
            f"A {steps}-step student of {teacher}, distilled with {record['method']} by its authors, released as "
            f"`{record['released']}`; {fewstep} converted that file."
        )
    loras = [
        f"`{os.path.basename(one['path'])}` at {one['weight']:g}"
        for one in record.get(RECORD, {}).get("loras", [])
    ]
    merged = f" with {' and '.join(loras)} merged into it" if loras else ""
    return (
        f"A {steps}-step student of `{teacher}`{merged}, distilled with {record['method']} by {fewstep} (recipe "
        f"{record.get('recipe', 'unknown')})." + _trained_on(record)
    )


def _trained_on(record: Mapping[str, Any]) -> str:
    """Of a student whose base was in fewer bits while it was trained."""
    on = record.get("trained_on")
    if on is None:
        return ""
    told = f" The base was in {on['quantization']} while it was trained"
    if "difference" not in on:
        return f"{told}."
    return (
        f"{told}; on the base as it is published, which is loaded below, its latents are off those by up to "
        f"{on['difference']:.2g} of their spread."
    )


def _front(record: Mapping[str, Any], measured: Mapping[str, Any] | None) -> list[str]:
    """What the hub reads, as YAML: licence, what it was made of, for what, and its numbers."""
    teacher, lora = str(record["teacher"]), record["kind"] == "lora"
    front: dict[str, Any] = dict(record.get("licence", {}))
    # A teacher of the hub by its id; one that others released, or that lies on this machine, is none there.
    if not ("released" in record or _local(teacher) or teacher.startswith("builtin:")):
        front |= {"base_model": teacher, "base_model_relation": "adapter" if lora else "finetune"}
    task, steps = _task(record), record["num_steps"]
    words = [task, "fewstep", str(record["method"]), "distillation", "few-step", f"{steps}-step"]
    words.append(f"diffusers:{record['pipeline_class']}")
    front |= {"library_name": "diffusers", "pipeline_tag": task, "tags": words + ["lora"] * lora}
    if measured:
        front["model-index"] = [
            {"name": str(record.get("title", "student")), "results": _results(task, measured)}
        ]
    return ["---", *(f"{name}: {json.dumps(value)}" for name, value in front.items()), "---"]


def _results(task: str, measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of ``model-index``: the numbers of the student's rows, each a result of its number of steps."""
    found = []
    for row in measured["rows"]:
        if row["kind"] != "student":
            continue
        calls = f"{row['steps']} {_plural(row['steps'])}"
        metrics = [
            {
                "type": name.partition("(")[0].strip().replace(" ", "-").lower(),
                "name": name,
                "value": one["value"],
            }
            for name, one in row["metrics"].items()
        ]
        # The hub joins results whose configuration is the same.
        data = {"type": "prompts", "name": f"{measured['images']} images, {calls}", "config": calls}
        found.append({"task": {"type": task}, "dataset": data, "metrics": metrics})
    return found


def _licence(record: Mapping[str, Any]) -> str:
    known = record.get("licence", {})
    if not known:
        return "A student is under its teacher's licence, which is not known here: add `license:` above to share it."
    name, link = known.get("license_name", known["license"]), known.get("license_link")
    return f"A student is under its teacher's licence: {f'[{name}]({link})' if link else name}."


def _measured(measured: Mapping[str, Any] | None) -> list[str]:
    if not measured:
        return []
    return ["## Measured", "", measured["table"], "", *(f"- {note}" for note in measured["notes"]), ""]


def model_card(record: Mapping[str, Any], measured: Mapping[str, Any] | None = None) -> str:
    """README.md with the front matter the hub reads.

    Args:
        record: of ``fewstep.json``. measured: ``rows``, ``notes`` and ``images`` of an evaluation's ``table.json``, and
            ``table``, its rows as Markdown.
    """
    several = (
        [
            f"It is {len(record['parts'])} students, each for a part of the prompts; the router, a tree of half-spaces "
            "of the prompt's embedding, says whose a prompt is. Each folder `part_k` is an export of its own.",
            "",
        ]
        if "parts" in record
        else []
    )
    teacher, run = str(record["teacher"]), "Run in this folder:"
    if _local(record["teacher"]):
        teacher = os.path.basename(teacher)
    if _lies_here(record):
        run = "Run in this folder; `fewstep.json` says where the teacher is:"
    return "\n".join(
        [
            *_front(record, measured),
            f"# {record.get('title', 'student')}",
            "",
            _made(record, teacher),
            "",
            *several,
            run,
            "",
            "```python",
            snippet(record),
            "```",
            "",
            *_about_sampling(record),
            "",
            *comfyui.lines(record),
            *_measured(measured),
            "## Licence",
            "",
            _licence(record),
            "",
        ]
    )
