"""PaliGemma with a side branch: pip install . && python examples/paligemma.py [name or folder]

It has no chat template: the processor makes the labels of the answer, its suffix.
"""

import sys

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor

from dpvr import DpvrConfig
from minibench.scenes import make_scene

name = sys.argv[1] if len(sys.argv) > 1 else "google/paligemma2-3b-mix-224"
device = "cuda" if torch.cuda.is_available() else "cpu"
base = AutoModelForImageTextToText.from_pretrained(name, dtype="auto", device_map=device)
processor = AutoProcessor.from_pretrained(name)
model = get_peft_model(base, DpvrConfig(split_layer=4, routing="kv_substitution"))
model.print_trainable_parameters()
config = model.peft_config["default"]
print("layer plan:", config.plan_for(base.config), "\nprefill FLOPs:", config.prefill_ratio(base.config, 1024, 128))

picture, asked = make_scene("train", seed=0, index=0).draw(), "<image>answer en What is it?"
prompt = processor(images=picture, text=asked, return_tensors="pt").to(device, base.dtype)
batch = processor(images=picture, text=asked, suffix="shapes", return_tensors="pt").to(device, base.dtype)
loss = model(**batch).loss
loss.backward()
torch.optim.AdamW((weight for weight in model.parameters() if weight.requires_grad), lr=1e-4).step()
model.save_pretrained("my-paligemma")
print("loss:", loss.item())

base = AutoModelForImageTextToText.from_pretrained(name, dtype="auto", device_map=device)
model = PeftModel.from_pretrained(base, "my-paligemma")
reply = model.generate(**prompt, max_new_tokens=20)
print("answer:", processor.decode(reply[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
