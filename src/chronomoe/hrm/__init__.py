"""HRM ACTv1: the hierarchical reasoning model with mixture-of-experts layers, as a language model that halts."""

from transformers import AutoConfig, AutoModelForCausalLM

from chronomoe.hrm.config import HRMACTv1Config
from chronomoe.hrm.model import HRMACTv1ForCausalLM, HRMACTv1Model

AutoConfig.register(HRMACTv1Config.model_type, HRMACTv1Config)
AutoModelForCausalLM.register(HRMACTv1Config, HRMACTv1ForCausalLM)

__all__ = ["HRMACTv1Config", "HRMACTv1ForCausalLM", "HRMACTv1Model"]
