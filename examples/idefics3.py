"""Idefics3 with a side branch: pip install . && python examples/idefics3.py [name or folder]

A picture is cut into tiles.
"""

import sys

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor

from dpvr import DpvrConfig
from minibench.scenes import make_scene

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceM4/Idefics3-8B-Llama3"
device = "cuda" if torch.cuda.is_available() else "cpu"
base = AutoModelForImageTextToText.from_pretrained(name, dtype="auto", device_map=device)
processor = AutoProcessor.from_pretrained(name)
model = get_peft_model(base, DpvrConfig(split_layer=4, routing="kv_substitution"))
model.print_trainable_parameters()
config = model.peft_config["default"]
print("layer plan:", config.plan_for(base.config), "\nprefill FLOPs:", config.prefill_ratio(base.config, 1024, 128))

picture = make_scene("train", seed=0, index=0).draw()
asked = {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]}
reply = {"role": "assistant", "content": [{"type": "text", "text": "shapes"}]}
options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
prompt = processor.apply_chat_template([asked], add_generation_prompt=True, **options).to(device, base.dtype)
batch = processor.apply_chat_template([asked, reply], **options).to(device, base.dtype)
labels = batch["input_ids"].clone()
labels[:, : prompt["input_ids"].shape[1]] = -100  # the loss is the answer's
loss = model(**batch, labels=labels).loss
loss.backward()
torch.optim.AdamW((weight for weight in model.parameters() if weight.requires_grad), lr=1e-4).step()
model.save_pretrained("my-idefics3")
print("loss:", loss.item())
base = AutoModelForImageTextToText.from_pretrained(name, dtype="auto", device_map=device)
model = PeftModel.from_pretrained(base, "my-idefics3")
reply = model.generate(**prompt, max_new_tokens=20)
print("answer:", processor.decode(reply[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
