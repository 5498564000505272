"""How the requests of the downstream task are worded: per intent, known wordings and wordings held out for a test.

Fields in braces are slots that `task.py` fills. A wording that begins with "=" is complete as it stands; before and
after the others a polite phrase may come. Several intents may share one action and differ in constant fields (lights
on, lights off).
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Intent:
    """One kind of request.

    Attributes:
        action: The action's name in the answer.
        keys: The answer's slots, in order.
        known: Wordings, one a line.
        held_out: Wordings that only the test of new phrasings uses.
        constants: Fields of the answer that the wording alone decides.
    """

    action: str
    keys: tuple[str, ...]
    known: str
    held_out: str
    constants: dict[str, str] = field(default_factory=dict[str, str])

    def wordings(self, *, held_out: bool) -> list[str]:
        """The wordings of one side, without surrounding blanks."""
        return [line.strip() for line in (self.held_out if held_out else self.known).strip().split("\n")]


INTENTS: tuple[Intent, ...] = (
    Intent(
        "set_alarm",
        ("time",),
        """wake me at {time}
        wake me up at {time}
        set an alarm for {time}
        set the alarm to {time}
        set my alarm for {time}
        = alarm at {time}
        = i need an alarm at {time}
        get me up at {time}
        get me out of bed at {time}
        ring the alarm at {time}
        = i have to be awake by {time}
        = i want to get up at {time}
        make an alarm for {time}
        let the alarm ring at {time}
        = the alarm should go off at {time}
        = at {time} wake me up""",
        """put the alarm on for {time}
        = i must be up at {time}
        have the alarm go off at {time}
        = at {time} i need to wake up""",
    ),
    Intent(
        "set_alarm",
        ("time", "days"),
        """wake me at {time} {days}
        wake me up {days} at {time}
        set an alarm for {time} {days}
        set the alarm to {time} {days}
        set my alarm {days} for {time}
        = alarm at {time} {days}
        = i need an alarm {days} at {time}
        get me up at {time} {days}
        get me out of bed {days} at {time}
        ring the alarm at {time} {days}
        = i have to be awake by {time} {days}
        = {days} i want to get up at {time}
        make an alarm {days} for {time}
        let the alarm ring {days} at {time}
        = the alarm should go off {days} at {time}
        = {days} at {time} wake me up""",
        """put the alarm on {days} for {time}
        = i must be up at {time} {days}
        have the alarm go off at {time} {days}
        = {days} i need to wake up at {time}""",
    ),
    Intent(
        "set_timer",
        ("minutes",),
        """set a timer for {minutes}
        start a timer for {minutes}
        set the timer to {minutes}
        start a {minutes} timer
        = timer {minutes}
        = timer for {minutes}
        count down {minutes}
        start a countdown of {minutes}
        = i need a timer for {minutes}
        = i need a timer of {minutes}
        tell me when {minutes} have passed
        let me know when {minutes} are up
        let me know in {minutes}
        beep after {minutes}
        beep in {minutes}
        give me {minutes} on the timer
        put {minutes} on the timer
        run a timer for {minutes}
        make a timer of {minutes}
        begin a countdown for {minutes}
        time {minutes} for me
        = the timer should ring in {minutes}
        = the timer should run for {minutes}
        = {minutes} on the timer""",
        """begin a timer of {minutes}
        run a countdown of {minutes}
        tell me when {minutes} are up
        let the timer run for {minutes}
        = i want a timer for {minutes}
        ring in {minutes}""",
    ),
    Intent(
        "remind",
        ("text", "time"),
        """remind me to {text} at {time}
        remind me at {time} to {text}
        = i need to {text} at {time} remind me
        set a reminder to {text} at {time}
        set a reminder for {time} to {text}
        add a reminder to {text} at {time}
        make a reminder for {time} to {text}
        = reminder at {time} to {text}
        = do not let me forget to {text} at {time}
        = i must not forget to {text} at {time}
        = at {time} remind me to {text}
        = at {time} i should {text} remind me
        tell me at {time} to {text}
        tell me to {text} at {time}
        help me remember to {text} at {time}
        = i want to be reminded to {text} at {time}
        = i want to be reminded at {time} to {text}
        give me a reminder to {text} at {time}
        create a reminder to {text} at {time}
        nudge me at {time} to {text}
        = there should be a reminder at {time} to {text}
        note that i have to {text} at {time}""",
        """create a reminder for {time} to {text}
        = at {time} tell me to {text}
        nudge me to {text} at {time}
        = do not let me forget at {time} to {text}
        give me a reminder at {time} to {text}
        = i would like a reminder to {text} at {time}""",
    ),
    Intent(
        "call",
        ("name",),
        """call {name}
        phone {name}
        ring {name}
        dial {name}
        give {name} a call
        make a call to {name}
        start a call with {name}
        place a call to {name}
        get {name} on the phone
        get me {name} on the line
        call {name} for me
        call {name} on the phone
        ring up {name}
        phone {name} for me
        connect me with {name}
        connect me to {name}
        = i want to talk to {name}
        = i want to call {name}
        = i need to speak to {name}
        = i need to phone {name}
        = i have to call {name}
        put me through to {name}
        dial the number of {name}
        call up {name}""",
        """give {name} a ring
        = i would like to speak to {name}
        = i need to talk to {name}
        ring {name} for me
        put a call through to {name}
        start a phone call with {name}""",
    ),
    Intent(
        "send_message",
        ("name", "text"),
        """send a message to {name} saying {text}
        send {name} a message saying {text}
        send {name} the message {text}
        text {name} that {text}
        text {name} saying {text}
        message {name} that {text}
        message {name} saying {text}
        write to {name} that {text}
        write {name} a message saying {text}
        tell {name} that {text}
        let {name} know that {text}
        send a text to {name} saying {text}
        send a note to {name} that says {text}
        send {name} a text that says {text}
        drop {name} a line saying {text}
        inform {name} that {text}
        = new message to {name} saying {text}
        = message to {name} that says {text}
        = i want to tell {name} that {text}
        = {name} should know that {text}
        give {name} the message {text}
        answer {name} that {text}
        reply to {name} that {text}
        reply to {name} saying {text}""",
        """write a message to {name} saying {text}
        send a message to {name} that says {text}
        answer {name} saying {text}
        = i want to let {name} know that {text}
        drop a note to {name} saying {text}
        send word to {name} that {text}""",
    ),
    Intent(
        "play",
        ("title",),
        """play {title}
        play the song {title}
        play me {title}
        play the track {title}
        put on {title}
        put on the song {title}
        start {title}
        start the song {title}
        start playing {title}
        = i want to hear {title}
        = i want to hear the song {title}
        = i want to listen to {title}
        = i would like to hear {title}
        = i feel like hearing {title}
        let me hear {title}
        let us hear {title}
        listen to {title}
        find the song {title} and play it
        find {title} and play it
        play something called {title}
        = music please play {title}
        play the tune {title}
        = the next song should be {title}
        turn on the song {title}""",
        """put on the track {title}
        let me listen to {title}
        = i would like to listen to {title}
        start the track {title}
        play us the song {title}
        = i feel like listening to {title}""",
    ),
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

PREFIXES = (
    "please",
    "could you",
    "can you",
    "can you please",
    "could you please",
    "would you",
    "hey",
    "ok",
    "i want you to",
    "i would like you to",
)
SUFFIXES = ("please", "thanks", "for me please", "now")
