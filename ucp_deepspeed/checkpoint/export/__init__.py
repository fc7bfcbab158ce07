"""Forms of the weights alone, for other libraries: folders of Hugging Face models, files of torch, adapters of PEFT."""

from ucp_deepspeed.checkpoint.export.adapter import AdapterOutput
from ucp_deepspeed.checkpoint.export.huggingface import HuggingFaceOutput
from ucp_deepspeed.checkpoint.export.torch_file import TorchOutput
from ucp_deepspeed.checkpoint.export.weights import DTYPES, WeightsSource, left_out

__all__ = ["DTYPES", "AdapterOutput", "HuggingFaceOutput", "TorchOutput", "WeightsSource", "left_out"]
