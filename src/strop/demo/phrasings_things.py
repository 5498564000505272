"""How requests are worded (as `phrasings.py` says): weather, ways, workouts, lights, volume, calendar, lists, words."""

from __future__ import annotations

from strop.demo.intent import Intent

THINGS: tuple[Intent, ...] = (
    Intent(
        "weather",
        ("city", "day"),
        """= what is the weather in {city} {day}
        = what will the weather be in {city} {day}
        = how is the weather in {city} {day}
        = how will the weather be {day} in {city}
        = what is the forecast for {city} {day}
        show me the forecast for {city} {day}
        show me the weather in {city} {day}
        tell me the weather in {city} {day}
        give me the forecast for {city} {day}
        = will it rain in {city} {day}
        = will it rain {day} in {city}
        = will it snow in {city} {day}
        = is it going to rain in {city} {day}
        = is it sunny in {city} {day}
        = will it be cold in {city} {day}
        = will it be warm {day} in {city}
        = do i need an umbrella in {city} {day}
        = do i need a coat {day} in {city}
        = how cold is it in {city} {day}
        = how warm will it be in {city} {day}
        check the weather in {city} {day}
        check the forecast {day} for {city}
        = weather in {city} {day}
        = forecast for {city} {day}
        = how hot will it get in {city} {day}
        = {day} what is the weather in {city}""",
        """= is it going to snow in {city} {day}
        = how warm is it in {city} {day}
        tell me the forecast for {city} {day}
        = will it be sunny in {city} {day}
        = what does the weather look like in {city} {day}
        = do i need a hat in {city} {day}""",
    ),
    Intent(
        "navigate",
        ("place", "mode"),
        """take me to the {place} {mode}
        navigate to the {place} {mode}
        = how do i get to the {place} {mode}
        = how do i get {mode} to the {place}
        show me the way to the {place} {mode}
        guide me to the {place} {mode}
        find the way to the {place} {mode}
        find a route to the {place} {mode}
        = directions to the {place} {mode}
        give me directions to the {place} {mode}
        get me to the {place} {mode}
        bring me to the {place} {mode}
        = i want to go to the {place} {mode}
        = i want to go {mode} to the {place}
        = i need to get to the {place} {mode}
        = what is the best way to the {place} {mode}
        = what is the fastest way to the {place} {mode}
        = route to the {place} {mode}
        start the route to the {place} {mode}
        lead me to the {place} {mode}
        = which way is the {place} {mode}
        plan a route to the {place} {mode}
        = let us go to the {place} {mode}
        navigate {mode} to the {place}""",
        """give me a route to the {place} {mode}
        = i have to get to the {place} {mode}
        guide me {mode} to the {place}
        start directions to the {place} {mode}
        = what is the quickest way to the {place} {mode}
        show me a route to the {place} {mode}""",
    ),
    Intent(
        "log_workout",
        ("sport", "minutes"),
        """log {minutes} of {sport}
        log a workout of {minutes} of {sport}
        = i did {minutes} of {sport}
        = i did {sport} for {minutes}
        = i just did {minutes} of {sport}
        = i went {sport} for {minutes}
        = i have been {sport} for {minutes}
        record {minutes} of {sport}
        record a workout {sport} for {minutes}
        save {minutes} of {sport}
        save my workout {minutes} of {sport}
        add {minutes} of {sport} to my workouts
        add a workout of {minutes} of {sport}
        = today i did {minutes} of {sport}
        = today i went {sport} for {minutes}
        write down {minutes} of {sport}
        = workout {sport} for {minutes}
        = workout {minutes} of {sport}
        track {minutes} of {sport}
        track {sport} for {minutes}
        enter {minutes} of {sport} in my training log
        put {minutes} of {sport} in the log
        = my training was {minutes} of {sport}
        = i finished {minutes} of {sport}""",
        """log {sport} for {minutes}
        = my workout was {minutes} of {sport}
        = today i finished {minutes} of {sport}
        note {minutes} of {sport} as a workout
        = i was {sport} for {minutes}
        put {minutes} of {sport} in my workouts""",
    ),
    Intent(
        "lights",
        ("room",),
        """turn on the light in the {room}
        turn the {room} light on
        turn the light on in the {room}
        switch on the light in the {room}
        switch the {room} light on
        switch on the {room} lights
        = light on in the {room}
        = lights on in the {room}
        put the {room} light on
        put on the light in the {room}
        make light in the {room}
        = the {room} needs light
        = i need light in the {room}
        turn on the {room} lamp
        = it is dark in the {room}""",
        """turn on the {room} lights
        switch the light on in the {room}
        = i want light in the {room}
        = it is too dark in the {room}""",
        {"state": "on"},
    ),
    Intent(
        "lights",
        ("room",),
        """turn off the light in the {room}
        turn the {room} light off
        turn the light off in the {room}
        switch off the light in the {room}
        switch the {room} light off
        switch off the {room} lights
        = light off in the {room}
        = lights off in the {room}
        put the {room} light out
        put out the light in the {room}
        make the {room} dark
        = no more light in the {room}
        = i need no light in the {room}
        turn off the {room} lamp
        = it is too bright in the {room}""",
        """turn off the {room} lights
        switch the light off in the {room}
        = i want no light in the {room}
        = lights out in the {room}""",
        {"state": "off"},
    ),
    Intent(
        "volume",
        ("level",),
        """set the volume to {level}
        set the volume to {level} percent
        = volume {level}
        = volume at {level} percent
        = volume to {level}
        turn the volume to {level}
        turn the volume down to {level} percent
        turn the volume up to {level}
        turn it down to {level} percent
        turn it up to {level} percent
        put the volume at {level}
        put the volume on {level} percent
        make the volume {level} percent
        change the volume to {level}
        change the sound to {level} percent
        set the sound to {level}
        set the sound to {level} percent
        = sound at {level} percent
        bring the volume to {level}
        bring the sound down to {level}
        = the volume should be {level}
        = i want the volume at {level} percent
        = i need the sound at {level}
        move the volume to {level} percent
        adjust the volume to {level}""",
        """adjust the sound to {level} percent
        bring the volume up to {level} percent
        = i want the sound at {level}
        put the sound at {level} percent
        = the sound should be at {level}
        make it {level} percent loud""",
    ),
    Intent(
        "add_event",
        ("title", "day", "time"),
        """put {title} in my calendar {day} at {time}
        add {title} to my calendar {day} at {time}
        add {title} to the calendar for {time} {day}
        schedule {title} {day} at {time}
        schedule {title} for {time} {day}
        plan {title} {day} at {time}
        enter {title} in the calendar {day} at {time}
        = i have {title} {day} at {time}
        = {day} at {time} i have {title}
        make an appointment {title} {day} at {time}
        book {title} {day} at {time}
        create an event {title} {day} at {time}
        create an entry {title} for {time} {day}
        = new event {title} {day} at {time}
        = new appointment {title} {day} at {time}
        save {title} for {time} {day}
        save the date {day} at {time} for {title}
        block {time} {day} for {title}
        block {day} at {time} for {title}
        = there is {title} {day} at {time}
        write {title} in my calendar {day} at {time}
        mark {title} in the calendar {day} at {time}
        = calendar {title} {day} at {time}
        set up {title} {day} at {time}""",
        """put {title} on the calendar for {time} {day}
        make an event {title} {day} at {time}
        = {day} there is {title} at {time}
        enter {title} for {time} {day}
        plan {title} for {time} {day}
        keep {day} at {time} for {title}""",
    ),
    Intent(
        "add_item",
        ("item",),
        """add {item} to the shopping list
        add {item} to my list
        add {item} to the list
        put {item} on the shopping list
        put {item} on my list
        put {item} on the list
        write {item} on the shopping list
        write {item} on my list
        = i need to buy {item}
        = i have to buy {item}
        = we need {item} from the shop
        = we are out of {item}
        = we need to buy {item}
        = we have no more {item}
        = there is no more {item} at home
        = shopping list {item}
        note {item} for shopping
        = {item} should be on the list
        = {item} belongs on the shopping list
        = we are running out of {item}
        get {item} on the shopping list
        include {item} in the shopping list
        = buy {item} next time
        = there is no {item} left""",
        """note {item} on the shopping list
        = i have no more {item}
        = we have to buy {item}
        put {item} down for shopping
        = {item} should be on the shopping list
        = we have no {item} left""",
    ),
    Intent(
        "translate",
        ("text", "language"),
        """translate {text} into {language}
        translate {text} to {language}
        = how do you say {text} in {language}
        = how do i say {text} in {language}
        say {text} in {language}
        = what is {text} in {language}
        = what is {language} for {text}
        tell me how to say {text} in {language}
        = what does {text} mean in {language}
        give me the {language} for {text}
        give me {text} in {language}
        put {text} into {language}
        turn {text} into {language}
        = {text} in {language}
        = the {language} for {text}
        show me {text} in {language}
        = i want to say {text} in {language}
        = i need {text} in {language}
        write {text} in {language}
        = how would you say {text} in {language}
        = how would i say {text} in {language}
        = in {language} what is {text}
        = in {language} how do i say {text}
        teach me to say {text} in {language}
        find the {language} for {text}""",
        """tell me {text} in {language}
        = what would {text} be in {language}
        = i need to say {text} in {language}
        show me how to say {text} in {language}
        = in {language} how do you say {text}
        tell me the {language} for {text}""",
    ),
)
