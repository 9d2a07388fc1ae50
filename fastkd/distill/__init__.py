"""The main job: `fastkd distill` trains a teacher and students, and shows what distilling gave."""
