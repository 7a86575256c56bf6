"""The text tower's head in closed form: before the first step, and again where texts are left out."""
