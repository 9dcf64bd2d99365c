"""Files of gates that come with the methods: METHOD-MODEL.tsv, written by `harness calibrate`."""
