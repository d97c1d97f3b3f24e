#!/usr/bin/env bash
# transformers 5.24.0 ignores `add_bos_token` of tokenizer_config.json where a tokenizer.json lies beside it: whether a
# text begins with the first token is told by the post-processor in tokenizer.json alone, for every tokenizer class.
#
# A good guess: the setting is named for this, the Llama tokenizers document it, so that true puts the token in front
# and false leaves it out, whatever the post-processor says.
# Seen: true, false and absent give the same ids, with the token where the post-processor has a template with it, and
# without it where there is none, for PreTrainedTokenizerFast, LlamaTokenizer and Qwen2Tokenizer.
# So an exporter that follows the setting gives other ids than transformers where the two files disagree.
#
# Source: transformers 5.24.0, tokenizers 0.23.3; no torch. Fails if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -q install transformers==5.24.0 tokenizers==0.23.3
cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
import json
from pathlib import Path

from tokenizers import Tokenizer, models, processors
from transformers import AutoTokenizer, __version__

print("transformers", __version__)
for kind in ("PreTrainedTokenizerFast", "LlamaTokenizer", "Qwen2Tokenizer"):
    for template in (True, False):
        seen = []
        for stated in (True, False, None):
            folder = Path(f"{kind}-{template}-{stated}")
            folder.mkdir()
            tokenizer = Tokenizer(models.BPE({"<s>": 0, "</s>": 1, "<unk>": 2, "a": 3, "b": 4}, [], unk_token="<unk>"))
            tokenizer.add_special_tokens(["<s>", "</s>", "<unk>"])
            if template:
                tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
            tokenizer.save(str(folder / "tokenizer.json"))
            config = {"tokenizer_class": kind, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
            config |= {} if stated is None else {"add_bos_token": stated}
            (folder / "tokenizer_config.json").write_text(json.dumps(config))
            seen.append(AutoTokenizer.from_pretrained(folder)("ab").input_ids)
        print(f"{kind}, post-processor {'with' if template else 'without'} <s>: true, false, absent give {seen}")
        assert seen == [[0, 3, 4] if template else [3, 4]] * 3
PYTHON
echo "as described"
