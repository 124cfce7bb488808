"""What runs a backbone: onnxruntime or torch."""
