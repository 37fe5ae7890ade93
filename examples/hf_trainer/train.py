"""A Hugging Face Trainer script, whose training steps are private. No Flower in it."""

import sys

import torch
from peft import LoraConfig, get_peft_model
from sklearn.datasets import load_digits
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification

from fedlora_flwr import PrivateTrainer


def build_model():
    """Return a small vision transformer with LoRA adapters and a head that trains."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        num_labels=10,
        initializer_range=0.1,
    )
    lora = LoraConfig(
        r=4, target_modules=r".*\.(q_proj|v_proj|query|value)", modules_to_save=["classifier"]
    )
    return get_peft_model(ViTForImageClassification(config), lora)


def load_data():
    """Return private training pictures and public test pictures."""
    digits = load_digits()
    pictures = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    records = [
        {"pixel_values": picture, "labels": int(label)}
        for picture, label in zip(pictures, digits.target, strict=True)
    ]
    return records[:1400], records[1400:]


def accuracy(prediction):
    """Return the share of pictures that the model names right."""
    right = prediction.predictions.argmax(1) == prediction.label_ids
    return {"accuracy": float(right.mean())}


def main(output):
    """Train, evaluate on the public pictures before and after, and save the adapters."""
    train, test = load_data()
    args = TrainingArguments(
        output,
        per_device_train_batch_size=128,  # expected: batches are Poisson samples
        max_grad_norm=1.0,  # of one record, over all trained tensors together
        num_train_epochs=8,
        learning_rate=0.05,
        logging_steps=20,
        save_steps=40,
        report_to="none",
    )
    trainer = PrivateTrainer(  # was: Trainer(
        build_model(),
        args,
        train_dataset=train,
        eval_dataset=test,
        compute_metrics=accuracy,
        epsilon=8.0,
        delta=1e-4,
        eval_is_public=True,
    )
    before = trainer.evaluate()["eval_accuracy"]
    spent = trainer.train().metrics["epsilon"]
    after = trainer.evaluate()["eval_accuracy"]
    trainer.save_model(output)
    print(f"accuracy {before:.3f} -> {after:.3f}, spent: ε = {spent:.3f} of 8")


if __name__ == "__main__":
    main(sys.argv[1])
