"""Training the tiny model, its training data, and scoring its images.

Not part of the installed package; it runs from a checkout of the repository:

    python -m training.train --output_dir OUT     # trains a pipeline and scores it
    python -m training.evaluation                 # scores the pipeline that ships in mmdit_lib/tiny/weights
    python -m training.gallery                    # draws a grid of example prompts
    python -m training.lora --output OUT          # trains a LoRA that draws outlines; needs peft
    python -m training.controlnet --output OUT    # trains a ControlNet that puts things where an image shows them

Scenes (`scenes`) are described by captions (`captions`, `tokenizers`) and drawn as pictures (`render`); `data` makes
the training set from them. `judge` recognizes the scene in a picture, and `evaluation` compares it with the prompt.
"""
