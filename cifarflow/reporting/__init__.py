"""What a person looks at: pictures, model diagrams and the progress bar."""
