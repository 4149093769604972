"Storms: hundreds of hostile files, wrong parameters and kills; `make storm` runs them, a sample runs with the other tests."
