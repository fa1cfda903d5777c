from distill_jax.cli.main import main

main()
