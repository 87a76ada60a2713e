"""Takes a trained model elsewhere: open_clip's folder, safetensors, ONNX, or a torch file, with a model card."""
