"""Models and stores on the Hugging Face hub, with their cards."""
