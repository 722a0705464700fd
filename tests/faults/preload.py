"""What every process of the campaign needs: imported once by the server that they are forked from."""

import datasets  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

import lora_dpo.cli
import lora_dpo.handing
import lora_dpo.run  # noqa: F401
