"""The model card as the hub reads it: licence, teacher, task, tags, numbers; and as a person does."""

import json

import pytest
from huggingface_hub import ModelCard

from fewstep.errors import FewstepError
from fewstep.export import model_card
from fewstep.export.card import encoding_of
from fewstep.export.licence import licence_of
from fewstep.export.target import describe, tell_measured

RECORD = {
    "fewstep": "0.2.0", "title": "my student", "method": "dmd2", "recipe": "abc", "kind": "lora", "num_steps": 4,
    "teacher": "stabilityai/sdxl", "pipeline_class": "StableDiffusionXLPipeline", "guidance_scale": 8.0,
    "licence": {"license": "openrail++"}, "call": {"num_inference_steps": 4, "guidance_scale": 0.0},
    "timesteps": [999, 749, 499, 249], "scheduler": "LCMScheduler", "latent_shape": [4, 8, 8],
}  # fmt: skip
TABLE = {
    "images": 500,
    "table": "| a table |",
    "notes": ["500 images in every row"],
    "rows": [
        {"name": "teacher", "kind": "teacher", "steps": 50, "metrics": {"FD(x@96)": {"value": 1.5}}},
        {
            "name": "student",
            "kind": "student",
            "steps": 4,
            "metrics": {"FD(x@96)": {"value": 2.5, "error": 0.1}},
        },
        {
            "name": "student",
            "kind": "student",
            "steps": 1,
            "metrics": {"same-noise distance(x)": {"value": 0.25}},
        },
    ],
}


def read(record=RECORD, measured=None):
    card = ModelCard(model_card(record, measured))
    return card.data.to_dict(), card.text


def test_the_hub_reads_what_it_is_and_of_what():
    front, text = read()
    assert front["license"] == "openrail++" and front["library_name"] == "diffusers"
    assert (front["base_model"], front["base_model_relation"]) == ("stabilityai/sdxl", "adapter")
    assert front["pipeline_tag"] == "text-to-image" and "model-index" not in front
    tags = "text-to-image fewstep dmd2 distillation few-step 4-step diffusers:StableDiffusionXLPipeline lora"
    assert front["tags"] == tags.split()
    assert "num_inference_steps=4" in text and "LCMScheduler.from_pretrained" in text
    assert "[999, 749, 499, 249]" in text and "licence: openrail++." in text and "## Measured" not in text


def test_a_whole_pipeline_is_a_finetune_and_an_unconditional_one_draws_unprompted():
    front, _ = read({**RECORD, "kind": "full"})
    assert front["base_model_relation"] == "finetune" and "lora" not in front["tags"]
    front, _ = read({**RECORD, "kind": "full", "pipeline_class": "DDPMPipeline"})
    assert front["pipeline_tag"] == front["tags"][0] == "unconditional-image-generation"


@pytest.mark.parametrize("teacher", ["builtin:emoji-xl", "/somewhere/teacher"])
def test_what_is_no_model_of_the_hub_is_not_named_as_one(teacher):
    front, text = read({**RECORD, "teacher": teacher, "licence": {}})
    assert (
        "base_model" not in front and "license" not in front and "/somewhere" not in json.dumps([front, text])
    )
    assert "licence, which is not known here" in text


def test_numbers_of_the_student_alone_go_to_the_hub_and_the_table_to_the_reader():
    front, text = read(measured=TABLE)
    [index] = front["model-index"]
    assert index["name"] == "my student"
    found = [
        (r["dataset"]["name"], [(m["type"], m["name"], m["value"]) for m in r["metrics"]])
        for r in index["results"]
    ]
    assert found == [
        ("500 images, 4 steps", [("fd", "FD(x@96)", 2.5)]),
        ("500 images, 1 step", [("same-noise-distance", "same-noise distance(x)", 0.25)]),
    ]
    assert "## Measured\n\n| a table |\n\n- 500 images in every row\n" in text


def test_a_student_that_is_measured_again_has_the_new_numbers_alone(tmp_path):
    describe(tmp_path, RECORD)
    plain = (tmp_path / "README.md").read_text()
    tell_measured(tmp_path, {**TABLE, "table": "| an older one |"})
    tell_measured(tmp_path, TABLE)
    text = (tmp_path / "README.md").read_text()
    assert text == model_card(RECORD, TABLE) != plain and text.count("## Measured") == 1


# ------------------------------------------------------------------------------------------------------------ licence
def card_of(folder, front):
    (folder / "README.md").write_text(f"---\n{front}\n---\n# a model\n---\nlicense: wrong\n")
    return licence_of(str(folder))


def test_the_licence_is_the_one_on_the_teachers_card(tmp_path, monkeypatch):
    assert licence_of("builtin:emoji-xl") == {"license": "apache-2.0"}
    assert licence_of(str(tmp_path)) == {}
    assert card_of(tmp_path, "license: openrail++\ntags: [a]") == {"license": "openrail++"}
    other = "license: other\nlicense_name: flux\nlicense_link: "
    found = {"license": "other", "license_name": "flux"}
    assert card_of(tmp_path, other + "LICENSE.md") == found  # that file is not in the export
    assert card_of(tmp_path, other + "https://a.b/c") == {**found, "license_link": "https://a.b/c"}

    monkeypatch.setattr("fewstep.export.licence._cached", lambda name: tmp_path / "README.md")
    card_of(tmp_path, other + "LICENSE.md")
    link = "https://huggingface.co/a/model/blob/main/LICENSE.md"
    assert licence_of("a/model") == {**found, "license_link": link}


def test_a_model_whose_card_is_not_here_is_pointed_to():
    found = licence_of("a/model")
    assert found == {
        "license": "other", "license_name": "of-the-base-model", "license_link": "https://huggingface.co/a/model"
    }  # fmt: skip
    _, text = read({**RECORD, "licence": found})
    assert "licence: [of-the-base-model](https://huggingface.co/a/model)." in text


@pytest.mark.parametrize("front", ["license: [", "- a\n- b", "", "tags: x", "license_name: x"])
def test_a_card_that_says_nothing_of_it_is_no_error(front, tmp_path):
    try:
        assert card_of(tmp_path, front) == {}
    except FewstepError:
        pytest.fail("a card is no reason to refuse an export")


def test_no_front_matter_at_all(tmp_path):
    (tmp_path / "README.md").write_text("license: mit\n---\nlicense: mit\n---\n")
    assert licence_of(str(tmp_path)) == {}


def test_exports_from_before_it_was_recorded_are_routed_on_what_sd_and_sdxl_encode():
    options = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    assert encoding_of({"routed_on": "pooled"}) == (2, options)
    assert encoding_of({"routed_on": "embeds"}) == (0, options)
    record = {"routed_on": "pooled", "encoding": {"at": 4, "max_sequence_length": 300}}
    assert encoding_of(record) == (4, {"max_sequence_length": 300}) and "at" in record["encoding"]
