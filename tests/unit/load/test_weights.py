"""The model folder without weights, as vitalis-serve and its memory plan see it."""

import pytest
from vitalis_load import weights
from vitalis_load.errors import LoadFailure
from vitalis_serve.engines import models
from vitalis_serve.engines.memory import architecture_of


def test_the_folder_is_a_whole_gpt_oss_20b_to_the_server(tmp_path):
    tokenizer = tmp_path / "tokenizer"
    (tokenizer / "tiktoken").mkdir(parents=True)
    (tokenizer / "tokenizer.json").write_text("{}")
    (tokenizer / "tiktoken" / models.VOCABULARY).write_text("")
    for _ in range(2):  # made again over what is there
        folder = weights.make(tmp_path / "model", tokenizer)
    assert models.check(folder) == ()
    found = architecture_of(folder)
    assert (found.family, found.attention_heads, found.layers_full + found.layers_sliding) == ("gpt_oss", 64, 24)
    assert (folder / "tiktoken" / models.VOCABULARY).is_file(), "Harmony loads it from beside the model"
    assert weights.settings(folder)["engines.engine_args.load-format"] == "dummy"


def test_a_folder_without_a_tokenizer_is_refused_with_a_remedy(tmp_path):
    with pytest.raises(LoadFailure, match=r"has no tokenizer\.json: give a folder with gpt-oss's tokenizer"):
        weights.make(tmp_path / "model", tmp_path)
