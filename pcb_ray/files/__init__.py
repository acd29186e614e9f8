"""Files of models: reading and writing bytes (`store`), and what they mean (`checkpoint`, `safetensors`, `torch_file`, `hub`)."""
